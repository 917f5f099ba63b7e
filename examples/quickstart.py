"""The smallest use: a clip at once, then the same clip token by token.

python examples/quickstart.py
"""

import torch

import continual_mha

mha = continual_mha.SingleOutputMultiheadAttention(
    embed_dim=512, num_heads=8, sequence_len=32, embed_dim_second=True
)
x = torch.rand(10, 512, 32)

with torch.no_grad():
    clip, weights = mha.forward(x)
    assert mha.forward_steps(x[:, :, :-1]) is None  # it answers once it has seen 32 tokens
    last = mha.forward_step(x[:, :, -1])

torch.testing.assert_close(last, clip[:, :, -1], atol=1e-6, rtol=0)
print(f"torch {torch.__version__}, backends {', '.join(continual_mha.backends.available())}")
