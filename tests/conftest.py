"""Models that many tests share: small, and with nothing left at its initial value."""

import pytest
import torch
import transformers

from wm_models import DogeForCausalLM

SMALL = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter, A, norms and residuals included, a value that shows when it is misplaced."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.ndim == 2:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            elif "norm" in name or "residual" in name:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise)


def rival(**changes: object) -> transformers.DogeForCausalLM:
    """transformers' own Doge, small and randomised."""
    model = transformers.DogeForCausalLM(transformers.DogeConfig(**{**SMALL, **changes})).eval()
    randomise(model)
    return model


def ours(model: transformers.DogeForCausalLM, **config: object) -> DogeForCausalLM:
    """This project's Doge with the same weights."""
    from wm_models import DogeConfig

    fields = {"expert_routing": "batch", **model.config.to_dict(), **config}
    copy = DogeForCausalLM(DogeConfig(**fields)).eval()
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """(3, 100) ids, no two equal in a row: equal tokens have equal biases, and ties may be broken either way."""
    draw = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(SMALL["vocab_size"], generator=draw)[:100] for _ in range(3)])
