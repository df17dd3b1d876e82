"""An expert group that starts beside others that serve every expert: nobody waits for it.

Its process imports torch, a second of CPU time and more, and chooses its kernels at low priority.
"""

from __future__ import annotations

from actors.gently import import_gently

import_gently("actors.expert_group")

from actors.expert_group import ExpertGroup


class GentleExpertGroup(ExpertGroup):
    """Once it is up, a group like any other."""

    _gentle = True
