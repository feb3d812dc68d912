"""The same training step in PyTorch, tuned: what our speed is compared with.

Needs the extra `[torch]`. timm's ViT is used where timm can be imported (it needs
torchvision); otherwise the same network is written out here.
"""


def name() -> str:
    """Return which network `step` uses: "timm" or "torch"."""
    try:
        import timm  # noqa: F401
    except Exception:  # timm imports torchvision, which fails in many ways.
        return "torch"
    return "timm"


def step(*, width, depth, heads, patch, image, classes, batch, dtype, compiled):
    """Return a function that does one training step and waits for the device.

    Forward, cross-entropy, backward, fused AdamW where there is a GPU; bfloat16 by
    autocast; scaled_dot_product_attention; the batch is on the device.

    Args:
        width, depth, heads, patch, image, classes: of the ViT.
        batch: {"image": uint8 [B, H, W, 3], "label": int32 [B]} in numpy.
        dtype: "float32" or "bfloat16".
        compiled: use torch.compile.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = _network(width, depth, heads, patch, image, classes).to(device).train()
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=1e-4, weight_decay=0.05, fused=device == "cuda"
    )
    pixels = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2).to(device)
    label = torch.from_numpy(batch["label"]).long().to(device)
    half = dtype == "bfloat16"

    def loss():
        with torch.autocast(device, torch.bfloat16, enabled=half):
            x = (pixels.float() / 255 - 0.5) / 0.5
            return torch.nn.functional.cross_entropy(net(x), label)

    run = torch.compile(loss) if compiled else loss

    def one():
        optimizer.zero_grad(set_to_none=True)
        run().backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return one


def _network(width, depth, heads, patch, image, classes):
    """Return timm's ViT of these sizes, or the same network in plain torch."""
    if name() == "timm":
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(
            img_size=image,
            patch_size=patch,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            num_classes=classes,
        )
    return _plain(width, depth, heads, patch, image, classes)


def _plain(width, depth, heads, patch, image, classes):
    """Return a pre-norm ViT with class token, learned positions and a linear head."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1 = nn.LayerNorm(width, eps=1e-6)
            self.qkv = nn.Linear(width, 3 * width)
            self.proj = nn.Linear(width, width)
            self.norm2 = nn.LayerNorm(width, eps=1e-6)
            self.fc1 = nn.Linear(width, 4 * width)
            self.fc2 = nn.Linear(4 * width, width)

        def forward(self, x):
            b, n, d = x.shape
            qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, heads, d // heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v)
            x = x + self.proj(y.transpose(1, 2).reshape(b, n, d))
            return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))

    class ViT(nn.Module):
        def __init__(self):
            super().__init__()
            tokens = (image // patch) ** 2
            self.embed = nn.Conv2d(3, width, patch, patch)
            self.cls = nn.Parameter(torch.zeros(1, 1, width))
            self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + tokens, width))
            self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
            self.norm = nn.LayerNorm(width, eps=1e-6)
            self.head = nn.Linear(width, classes)

        def forward(self, x):
            x = self.embed(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
            return self.head(self.norm(self.blocks(x))[:, 0])

    return ViT()
