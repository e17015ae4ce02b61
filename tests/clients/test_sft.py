"""Seeds in trl's SFTTrainer, in a whole model and beside an adapter. It skips where trl is not installed.

trl is in no extra and not in CI: what it needs (datasets, pyarrow) is larger than all other clients together.
"""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import math

import pytest
import torch
from clients.test_transformers import NEVER, SLOT, VOCABULARY, Capturing, Seed, Tokens, host_of, lively, net
from peft import LoraConfig
from same import same
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from seedtriton import Stage
from seedtriton.integrations.transformers import GrowthCallback, GrowthTrainerMixin

pytestmark = pytest.mark.filterwarnings("default")  # the client's own are its business


@pytest.fixture(scope="module")
def trl():
    why = "trl is not installed: pip install trl, docs/clients.md"
    return pytest.importorskip("trl", reason=why, exc_type=ImportError)


def words():
    known = {f"w{number}": number for number in range(VOCABULARY - 2)} | {"<e>": VOCABULARY - 2, "<u>": VOCABULARY - 1}
    inner = Tokenizer(models.WordLevel(known, unk_token="<u>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<e>", pad_token="<e>", unk_token="<u>")


def tuned(trl, folder, model, callback=None, resume=None, kinds=(GrowthTrainerMixin, Capturing), peft=None, **more):
    from datasets import Dataset

    known = {
        "num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "bf16": False, "gradient_checkpointing": False,
        "max_length": 8, "seed": 3, "logging_steps": 3,
    }  # fmt: skip
    kind = type("Tuning", (*(kinds if callback else kinds[1:]), trl.SFTTrainer), {})
    trainer = kind(
        model, trl.SFTConfig(str(folder), **(known | more)), processing_class=words(), peft_config=peft,
        train_dataset=Dataset.from_dict({"input_ids": Tokens().rows.tolist()}),
        callbacks=[callback] if callback else [],
    )  # fmt: skip
    trainer.sums = []
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_ratio_is_that_of_the_gradients_and_the_host_is_the_one_without_a_seed(trl, tmp_path):
    callback = GrowthCallback(seeds={SLOT: Seed}, thresholds=NEVER, sinks=[])
    trainer = tuned(trl, tmp_path / "a", net(), callback, gradient_accumulation_steps=2)
    evidence, sums = trainer.growth.evidence()[SLOT], trainer.sums
    seed, host = (math.sqrt(math.fsum(s[who] for s in sums) / len(sums)) for who in ("seed", "host"))
    assert evidence.samples == len(sums) == 8
    assert evidence.ratio == pytest.approx(seed / (host + 1e-8), rel=1e-6)
    alone = tuned(trl, tmp_path / "b", net(GPT2LMHeadModel), gradient_accumulation_steps=2)
    assert same(host_of(trainer.model), host_of(alone.model))

    def lines(trainer):
        keys = ("loss", "grad_norm", "entropy", "mean_token_accuracy")
        return [{key: line[key] for key in keys} for line in trainer.state.log_history if "loss" in line]

    assert lines(trainer) == lines(alone) != []


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "adapter"])
def test_a_run_that_is_resumed_goes_on_bit_for_bit(trl, adapted, tmp_path):
    more = {"save_strategy": "steps", "save_steps": 5, "num_train_epochs": 3}

    def run(folder, resume=None):
        lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True) if adapted else None
        return tuned(trl, tmp_path / folder, net(), lively(), resume, peft=lora, **more)

    whole = run("a")
    assert whole.growth.slots[SLOT].stage is not Stage.TRAINING
    again = run("b", str(tmp_path / "a" / "checkpoint-5"))
    for part in ("model", "optimizer", "growth"):
        assert same(getattr(again, part).state_dict(), getattr(whole, part).state_dict()), part
    assert torch.isfinite(torch.tensor(whole.state.log_history[-1]["train_loss"]))
