r"""Classes by their names: embeds prompts by the text tower of a CLIP or SigLIP, for `model.zero_shot`.

printf '%s\n' cat dog 'traffic light' > names.txt
python examples/zero_shot.py laion/CLIP-ViT-B-16-laion2B-s34B-b88K names.txt classes.safetensors
mgpu-infer model=timm model.name=vit_base_patch16_clip_224.laion2b model.zero_shot=classes.safetensors \
    data=folder data.root=photos
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

TEMPLATES = (
    *("a photo of a {}.", "a blurry photo of a {}.", "a close-up photo of a {}.", "a photo of the large {}."),
    *("a photo of the small {}.", "a drawing of a {}.", "art of the {}.", "itap of a {}."),
)
"""Each name is put into each of these, and the embeddings are averaged, as CLIP's authors do."""


def embed(model: torch.nn.Module, tokenize: object, name: str) -> torch.Tensor:
    """The direction of a class, fp32 (width,)."""
    prompts = [template.format(name) for template in TEMPLATES]
    # SigLIP was trained with texts of one length.
    tokens = tokenize(prompts, padding="max_length", truncation=True, return_tensors="pt")
    returned = model.get_text_features(**tokens)
    features = returned if isinstance(returned, torch.Tensor) else returned.pooler_output
    return normalize(normalize(features, dim=1).mean(dim=0), dim=0)


@torch.inference_mode()
def main(repository: str, names_file: str, path: str) -> None:
    names = Path(names_file).read_text(encoding="utf-8").splitlines()
    model, tokenize = AutoModel.from_pretrained(repository).eval(), AutoTokenizer.from_pretrained(repository)
    classes = {"embeddings": torch.stack([embed(model, tokenize, name) for name in names])}
    # The parameter is the logarithm of the factor.
    classes["logit_scale"] = model.logit_scale.detach().exp().reshape(())
    if hasattr(model, "logit_bias"):
        classes["logit_bias"] = model.logit_bias.detach().reshape(())
    save_file(classes, path, metadata={"names": json.dumps(names)})


if __name__ == "__main__":
    main(*sys.argv[1:])
