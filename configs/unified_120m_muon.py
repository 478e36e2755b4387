# Unified Dense-0.12B under Muon (the paper's figure 8, appendix B).
from configs.unified_120m import *

out_dir = "out/unified_120m_muon"

optimizer = "muon"
learning_rate = 5e-3
