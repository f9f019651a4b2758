"""Convolution meets attention: ConvNeXt, ConvMixer, ViT (two ways to attend), MobileViT."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import Entry, floats


class LayerNorm(nn.Module):
    """ConvNeXt's own: channels last through `F.layer_norm`, channels first by hand."""

    def __init__(self, channels: int, eps: float = 1e-6, data_format: str = "channels_last") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels).uniform_(0.5, 1.5))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-0.3, 0.3))
        self.eps, self.data_format = eps, data_format
        self.normalized_shape = (channels,)

    def forward(self, x: Tensor) -> Tensor:
        if self.data_format == "channels_last":
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = LayerNorm(dim)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.empty(dim).uniform_(-0.5, 1.0))
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inp = x
        x = self.dwconv(x)
        x = x.permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)
        x = self.norm(x)
        x = self.pwconv2(self.act(self.pwconv1(x)))
        if self.gamma is not None:
            x = self.gamma * x
        x = x.permute(0, 3, 1, 2)
        return inp + self.drop_path(x)


class ConvNeXt(nn.Module):
    def __init__(self, dims: tuple[int, ...] = (8, 12, 16), classes: int = 10) -> None:
        super().__init__()
        self.downsample_layers, self.stages = nn.ModuleList(), nn.ModuleList()
        for i, dim in enumerate(dims):
            if i == 0:
                down = nn.Sequential(nn.Conv2d(3, dim, 4, stride=4), LayerNorm(dim, data_format="channels_first"))
            else:
                norm = LayerNorm(dims[i - 1], data_format="channels_first")
                down = nn.Sequential(norm, nn.Conv2d(dims[i - 1], dim, kernel_size=2, stride=2))
            self.downsample_layers.append(down)
            self.stages.append(nn.Sequential(*[ConvNeXtBlock(dim) for _ in range(2 if i == 1 else 1)]))
        self.norm, self.head = nn.LayerNorm(dims[-1], eps=1e-6), nn.Linear(dims[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(len(self.stages)):
            x = self.downsample_layers[i](x)
            x = self.stages[i](x)
        x = self.norm(x.mean([-2, -1]))  # global average pooling
        return self.head(x)


class Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


def conv_mixer(dim: int = 16, depth: int = 2, kernel: int = 5, patch: int = 4, classes: int = 10) -> nn.Sequential:
    """ConvMixer as its paper prints it: nested `Sequential`s, `padding="same"`, GELU before batch norm."""
    return nn.Sequential(
        nn.Conv2d(3, dim, kernel_size=patch, stride=patch),
        nn.GELU(),
        nn.BatchNorm2d(dim),
        *[
            nn.Sequential(
                Residual(
                    nn.Sequential(
                        nn.Conv2d(dim, dim, kernel, groups=dim, padding="same"), nn.GELU(), nn.BatchNorm2d(dim)
                    )
                ),
                nn.Conv2d(dim, dim, kernel_size=1),
                nn.GELU(),
                nn.BatchNorm2d(dim),
            )
            for _ in range(depth)
        ],
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(dim, classes),
    )


class Attention(nn.Module):
    """timm's: one linear layer for q, k and v, `unbind`, fused attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        x = x.transpose(1, 2).reshape(b, n, c)
        return self.proj(x)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(dim), Attention(dim, heads), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim * 2), nn.GELU(), nn.Dropout(0.1), nn.Linear(dim * 2, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MultiheadBlock(nn.Module):
    """torchvision's encoder block on `nn.MultiheadAttention`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(dim, heads, dropout=0.1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, dim * 2), nn.GELU(approximate="tanh"), nn.Linear(dim * 2, dim))

    def forward(self, inputs: Tensor) -> Tensor:
        torch._assert(inputs.dim() == 3, "expected (batch, sequence, channels)")
        x = self.ln_1(inputs)
        x, _ = self.self_attention(x, x, x, need_weights=False)
        x = x + inputs
        return x + self.mlp(self.ln_2(x))


class ViT(nn.Module):
    """A convolutional stem (Xiao et al. 2021), class token, learned positions, transformer blocks."""

    def __init__(self, block: type[nn.Module], dim: int = 24, heads: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 12, 3, 2, 1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(inplace=True),
            nn.Conv2d(12, 16, 3, 2, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, dim, 1),
        )
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 8 * 8 + 1, dim) * 0.3)
        self.blocks = nn.Sequential(block(dim, heads), block(dim, heads))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = x + self.pos_embed
        x = self.norm(self.blocks(x))
        return self.head(x[:, 0])


class MobileViTBlock(nn.Module):
    """Unfold into patches by reshape and transpose, attend across patches, fold back."""

    def __init__(self, channels: int, dim: int, patch: int = 2) -> None:
        super().__init__()
        self.patch = patch
        self.conv1, self.conv2 = self._conv(channels, channels, 3), self._conv(channels, dim, 1)
        self.transformer = nn.Sequential(Block(dim, 2))
        self.conv3, self.conv4 = self._conv(dim, channels, 1), self._conv(2 * channels, channels, 3)

    @staticmethod
    def _conv(inp: int, out: int, k: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inp, out, k, 1, k // 2, bias=False), nn.BatchNorm2d(out), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        x = self.conv2(self.conv1(x))
        p = self.patch
        b, d, h, w = x.shape
        x = x.reshape(b * d * (h // p), p, w // p, p).transpose(1, 2)
        x = x.reshape(b, d, (h // p) * (w // p), p * p).transpose(1, 3).reshape(b * p * p, -1, d)
        x = self.transformer(x)
        x = x.contiguous().view(b, p * p, (h // p) * (w // p), d).transpose(1, 3)
        x = x.reshape(b * d * (h // p), w // p, p, p).transpose(1, 2).reshape(b, d, h, w)
        x = torch.cat((self.conv3(x), y), 1)
        return self.conv4(x)


class MobileViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.SiLU())
        self.mvit = MobileViTBlock(12, 16)
        self.pool, self.fc = nn.AvgPool2d(16, 1), nn.Linear(12, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mvit(self.conv1(x))
        x = self.pool(x).view(-1, x.shape[1])
        return self.fc(x)


FAMILIES = {
    "convnext": Entry(ConvNeXt, floats(3, 48, 48)),
    "convmixer": Entry(conv_mixer, floats(3, 32, 32)),
    "vit_conv_stem": Entry(lambda: ViT(Block), floats(3, 32, 32)),
    "vit_multihead": Entry(lambda: ViT(MultiheadBlock), floats(3, 32, 32)),
    "mobilevit": Entry(MobileViT, floats(3, 32, 32)),
}
