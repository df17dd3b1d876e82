"""`raymoe bench`: load on any OpenAI endpoint, faults in a local deployment, and what came of it.

load.py     which request when: closed loop, Poisson arrivals, a trace; the mix of domains
prompts.py  texts by domain
sse.py      one streamed request over a plain socket, every event with its time
run.py      sends the load, keeps a record of every request
measure.py  records -> TTFT, TPOT, gaps, throughput, goodput, failures
faults.py   kill, stop, slow or drain at given seconds
profile.py  where the routers' steps spend their time
report.py   table, JSON, an HTML page
"""
