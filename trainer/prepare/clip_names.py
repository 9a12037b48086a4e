"""Which open_clip model a timm CLIP backbone is the visual tower of."""

ARCHITECTURES = {
    "vit_base_patch32_clip_224": "ViT-B-32",
    "vit_base_patch32_clip_256": "ViT-B-32-256",
    "vit_base_patch16_clip_224": "ViT-B-16",
    "vit_base_patch16_plus_clip_240": "ViT-B-16-plus-240",
    "vit_large_patch14_clip_224": "ViT-L-14",
    "vit_large_patch14_clip_336": "ViT-L-14-336",
    "vit_huge_patch14_clip_224": "ViT-H-14",
    "vit_huge_patch14_clip_378": "ViT-H-14-378",
    "vit_giant_patch14_clip_224": "ViT-g-14",
    "vit_gigantic_patch14_clip_224": "ViT-bigG-14",
    "eva02_base_patch16_clip_224": "EVA02-B-16",
    "eva02_large_patch14_clip_224": "EVA02-L-14",
    "eva02_large_patch14_clip_336": "EVA02-L-14-336",
}
"""timm architecture, without `quickgelu_`, and open_clip's name."""

TAGS = {
    "openai": "openai",
    "laion400m_e32": "laion400m_e32",
    "dfn2b": "dfn2b",
    "dfn2b_s39b": "dfn2b_s39b",
    "dfn5b": "dfn5b",
    "metaclip_400m": "metaclip_400m",
    "metaclip_2pt5b": "metaclip_fullcc",
    "metaclip_altogether": "metaclip_altogether",
}
"""Tags that mean the same for all architectures."""

OWN_TAGS = {
    "vit_base_patch32_clip_224.laion2b": "laion2b_s34b_b79k",
    "vit_base_patch16_clip_224.laion2b": "laion2b_s34b_b88k",
    "vit_large_patch14_clip_224.laion2b": "laion2b_s32b_b82k",
    "vit_huge_patch14_clip_224.laion2b": "laion2b_s32b_b79k",
    "vit_giant_patch14_clip_224.laion2b": "laion2b_s12b_b42k",
    "vit_gigantic_patch14_clip_224.laion2b": "laion2b_s39b_b160k",
    "vit_base_patch32_clip_224.datacompxl": "datacomp_xl_s13b_b90k",
    "vit_base_patch32_clip_256.datacompxl": "datacomp_s34b_b86k",
    "vit_base_patch16_clip_224.datacompxl": "datacomp_xl_s13b_b90k",
    "vit_large_patch14_clip_224.datacompxl": "datacomp_xl_s13b_b90k",
    "eva02_base_patch16_clip_224.merged2b": "merged2b_s8b_b131k",
    "eva02_large_patch14_clip_224.merged2b": "merged2b_s4b_b131k",
    "eva02_large_patch14_clip_336.merged2b": "merged2b_s6b_b61k",
}
"""The others, by the backbone's whole name."""

QUICK = {"openai", "dfn2b", "dfn5b", "metaclip_400m", "metaclip_fullcc"}
"""open_clip tags trained with QuickGELU, also in the text tower."""
QUICK_HERE = {("ViT-B-32", "laion400m_e32")}
"""The same, where the tag does not tell."""


def text_model_of(backbone: str) -> str | None:
    """`NAME:TAG` of the open_clip model whose visual tower a timm name stands for, if known."""
    architecture, _, tag = backbone.replace("_quickgelu", "").partition(".")
    name = ARCHITECTURES.get(architecture)
    theirs = OWN_TAGS.get(f"{architecture}.{tag}", TAGS.get(tag))
    if name is None or theirs is None:
        return None
    quick = theirs in QUICK or (name, theirs) in QUICK_HERE
    return f"{name}{'-quickgelu' if quick else ''}:{theirs}"
