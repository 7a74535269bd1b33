"""Hugging Face's own models of both types, made at random or loaded, and their folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DeepseekOcr2TextConfig, DeepseekOcr2TextModel, DeepseekV2Config, DeepseekV2ForCausalLM

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # so that attention and routing are far from uniform
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "norm_topk_prob": False,
    "aux_loss_alpha": 0.01,
}
V1 = {**SIZES, "model_type": "deepseek", "architectures": ["DeepseekForCausalLM"], "rope_scaling": None}
V1_DENSE = {**V1, **dict.fromkeys(("n_routed_experts", "n_shared_experts", "num_experts_per_tok"))}
LATENT = {"kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "q_lora_rank": None}
GREEDY = {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
LIMITED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}
YARN = {
    "type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.5,
}
V2_LITE = {**SIZES, **LATENT, **GREEDY, "model_type": "deepseek_v2", "rope_scaling": None}
V2 = {**V2_LITE, **LIMITED, "q_lora_rank": 40}
V2_YARN = {**V2_LITE, "rope_scaling": YARN}


class DeepseekForCausalLM(nn.Module):
    """DeepSeekMoE (V1), which transformers has without a head, as the text model of DeepSeek-OCR-2."""

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__()
        dense = fields["first_k_dense_replace"] if fields["n_routed_experts"] else fields["num_hidden_layers"]
        kinds = ["dense"] * dense + ["sparse"] * (fields["num_hidden_layers"] - dense)
        given = {name: value for name, value in fields.items() if name in SIZES and value is not None}
        config = DeepseekOcr2TextConfig(**given, mlp_layer_types=kinds, attn_implementation="eager")
        self.model = DeepseekOcr2TextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=config.initializer_range)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.model(tokens).last_hidden_state)


def make(fields: dict[str, Any], folder: Path, seed: int) -> nn.Module:
    """A random model, written to a new folder as its releases are."""
    torch.manual_seed(seed)
    folder.mkdir()
    if fields["model_type"] == "deepseek":
        model = with_uneven_norms(DeepseekForCausalLM(fields))
        save_file(unstacked(model.state_dict()), folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(fields))
    else:
        model = with_uneven_norms(DeepseekV2ForCausalLM(DeepseekV2Config(**fields)))
        model.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
def with_uneven_norms(model: nn.Module) -> nn.Module:
    """Norms other than 1, so that it shows when one is another's."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    return model


def load(folder: Path) -> nn.Module:
    """The model of a folder, with plain transformers."""
    fields = json.loads((folder / "config.json").read_text())
    if fields["model_type"] != "deepseek":
        return DeepseekV2ForCausalLM.from_pretrained(folder).eval()
    model = DeepseekForCausalLM(fields)
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    model.load_state_dict(stacked(tensors, fields["n_routed_experts"]), strict=True)
    return model.eval()


def stacked(tensors: dict[str, torch.Tensor], num_experts: int | None) -> dict[str, torch.Tensor]:
    """A released checkpoint's tensors as transformers holds them: the experts of a layer in one."""
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for prefix in sorted({name.split(".experts.")[0] for name in tensors if ".experts." in name}):
        gate, up, down = (
            torch.stack([tensors[f"{prefix}.experts.{e}.{name}_proj.weight"] for e in range(num_experts)])
            for name in ("gate", "up", "down")
        )
        found[f"{prefix}.experts.gate_up_proj"] = torch.cat((gate, up), dim=1)
        found[f"{prefix}.experts.down_proj"] = down
    return found


def unstacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The reverse."""
    found = {}
    for name, tensor in tensors.items():
        prefix, stack = name.rsplit(".", 1)
        if stack == "gate_up_proj":
            for expert, (gate, up) in enumerate(matrix.chunk(2) for matrix in tensor):
                found[f"{prefix}.{expert}.gate_proj.weight"] = gate.contiguous()
                found[f"{prefix}.{expert}.up_proj.weight"] = up.contiguous()
        elif stack == "down_proj":
            found |= {f"{prefix}.{e}.down_proj.weight": matrix.clone() for e, matrix in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


@torch.no_grad()
def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """[batch, sequence, vocabulary]."""
    out = model(tokens)
    return out if isinstance(out, torch.Tensor) else out.logits
