# Unified MoE-0.5B under Muon (the paper's figure 8, appendix B).
from configs.unified_moe_500m import *

out_dir = "out/unified_moe_500m_muon"

optimizer = "muon"
learning_rate = 4e-3
