"""What the project relies on in TRL. A failure says what changed there and which of our functions needs a look."""

import inspect
import re

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from PIL import Image
from trl import GRPOConfig, GRPOTrainer
from trl.kernels import chunked_logprob
from trl.models import unwrap_model_for_generation
from trl.trainer import grpo_trainer
from trl.trainer.utils import add_fused_lm_head, create_model_from_path

from conftest import PROMPTS
from stage_grpo.policy import left_pad, load_policy, load_tokenizer
from stage_grpo.policy.scoring_head import CPU_TOKENS_A_TILE, add_scoring_head
from stage_grpo.presets import CHOICES, UNSUPPORTED
from stage_grpo.trl_seams import reference_of

NUM_TOKENS = 36


def parameters(function):
    return inspect.signature(function).parameters.keys()


def scripted_rollout(prompts, trainer):
    """A rollout of the form of ``trl_seams.sample_images`` with codes, pictures and entropies made up."""
    generator = torch.Generator().manual_seed(0)
    return {
        "prompt_ids": trainer.policy.encode_prompts(trainer.processing_class, prompts),
        "completion_ids": torch.randint(512, (len(prompts), NUM_TOKENS), generator=generator).tolist(),
        "logprobs": None,
        "generated_images": [Image.new("RGB", (48, 48), (i, 0, 0)) for i in range(len(prompts))],
        "policy_entropy": [0.5 * i for i in range(len(prompts))],
    }


def position(prompts, **_):
    """A reward that differs within each group: the sample's place."""
    return [float(i) for i in range(len(prompts))]


def trl_trainer(checkpoint, folder, rewards=(position,), rollout_func=scripted_rollout, **changes):
    """TRL's own trainer on an image policy: nothing of StageTrainer."""
    policy = load_policy(checkpoint)
    values = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "beta": 0.03,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_completion_length": NUM_TOKENS,
        "loss_type": "grpo",
    }
    rows = Dataset.from_dict({"prompt": PROMPTS, "metadata": [f'{{"row": {i}}}' for i in range(4)]})
    with reference_of(policy):
        trainer = GRPOTrainer(
            policy,
            list(rewards),
            GRPOConfig(str(folder), **{**values, **changes}),
            rows,
            processing_class=load_tokenizer(policy),
            rollout_func=rollout_func,
        )
    trainer.policy = policy
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def rows_of(trainer):
    """Two prompts, four images each, in training mode: what TRL hands to a rollout."""
    trainer.model.train()
    return [dict(row) for row in trainer.train_dataset.select(range(2)) for _ in range(4)]


@pytest.fixture
def plain(checkpoint, tmp_path):
    return trl_trainer(checkpoint, tmp_path)


def test_the_overridden_methods_exist_with_the_arguments_passed_on():
    wanted = {
        "_generate_and_score_completions": ["inputs"],
        "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
        "_compute_loss": ["model", "inputs"],
        "_get_per_token_logps_and_entropies": ["model", "input_ids", "attention_mask", "logits_to_keep"],
        "training_step": ["model", "inputs"],
        "evaluate": [],
    }
    for name, arguments in wanted.items():
        method = getattr(GRPOTrainer, name, None)
        assert method is not None, f"TRL no longer has GRPOTrainer.{name}, which StageTrainer overrides"
        assert list(parameters(method))[1 : len(arguments) + 1] == arguments, (
            f"the arguments of GRPOTrainer.{name} are now {list(parameters(method))}; adapt StageTrainer.{name}"
        )
    scoring = parameters(GRPOTrainer._get_per_token_logps_and_entropies)
    assert "compute_entropy" in scoring, "StageTrainer._get_per_token_logps_and_entropies passes compute_entropy=True"


def test_a_rollout_comes_back_scored_with_its_groups_contiguous(plain):
    output = plain._generate_and_score_completions(rows_of(plain))
    keys = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "ref_per_token_logps"}
    assert keys <= output.keys(), (
        f"_generate_and_score_completions no longer returns {keys - output.keys()}; "
        "StageTrainer._generate_and_score_completions and _compute_loss read them"
    )
    assert output["advantages"].shape == (8,), (
        "TRL's advantages are no longer one number a completion; StageTrainer._token_weights makes (B, T) of (B,)"
    )
    assert output["completion_mask"].eq(1).all() and output["completion_ids"].shape == (8, NUM_TOKENS), (
        "TRL cuts or masks completions of equal length: check how it finds ends and complete_args"
    )
    lengths = output["prompt_mask"].sum(dim=1)
    assert torch.equal(lengths, lengths[[0, 0, 0, 0, 4, 4, 4, 4]]) and lengths[0] != lengths[4], (
        "images of one prompt no longer stand together when _generate_and_score_completions returns; "
        "StageTrainer._token_weights compares neighbours"
    )
    sums = output["advantages"].view(2, 4).sum(dim=1)
    assert sums.abs().max() < 1e-4, "TRL no longer normalises within groups; token_weights relies on their signs"


def test_policy_is_scored_before_the_reference_and_both_before_the_rewards(checkpoint, tmp_path):
    """Steps out of line with generation make TRL score the policy as well; the last scoring is the reference's."""
    trainer = trl_trainer(checkpoint, tmp_path, steps_per_generation=2, per_device_train_batch_size=4)
    events = []

    def spy(name, original):
        def called(*args, **kwargs):
            who = {id(trainer.model): "policy", id(trainer.ref_model): "reference"}.get(id(args[0]) if args else 0)
            events.append(who if name == "score" else name)
            return original(*args, **kwargs)

        return called

    trainer._get_per_token_logps_and_entropies = spy("score", trainer._get_per_token_logps_and_entropies)
    trainer._calculate_rewards = spy("rewards", trainer._calculate_rewards)
    trainer._generate_and_score_completions(rows_of(trainer))
    assert events == ["policy", "reference", "rewards"], (
        f"TRL's order is now {events}; StageTrainer._calculate_rewards takes the last scoring for the reference's, "
        "and the entropy reward needs it before the rewards are final"
    )


def test_trls_dump_of_a_sample_without_a_score_is_not_logged(caplog):
    PartialState()
    for message in ("All reward functions returned None for the following kwargs:\n...", "another message"):
        grpo_trainer.logger.warning(message)
    assert [record.getMessage() for record in caplog.records] == ["[RANK 0] another message"], (
        "TRL, or accelerate's logger, words it otherwise now; see the filter in trl_seams.py"
    )


def test_the_loss_scores_exactly_once_with_its_gradient(plain):
    batch = plain._generate_and_score_completions(rows_of(plain))
    original, calls = plain._get_per_token_logps_and_entropies, []
    plain._get_per_token_logps_and_entropies = lambda *a, **k: calls.append(original(*a, **k)) or calls[-1]
    plain._compute_loss(plain.model, batch)
    assert len(calls) == 1 and calls[0][0].requires_grad and calls[0][0].shape == (8, NUM_TOKENS), (
        "_compute_loss no longer scores the batch once through _get_per_token_logps_and_entropies; "
        "StageTrainer._compute_loss reads log-probabilities and entropies from that call"
    )


def test_advantages_of_one_number_a_token_are_accepted(plain):
    """Linear in the advantages: with ratio 1 the loss is minus their mean."""
    batch = plain._generate_and_score_completions(rows_of(plain))
    plain.beta = 0.0
    with torch.no_grad():
        batch["old_per_token_logps"] = plain._get_per_token_logps_and_entropies(
            plain.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            NUM_TOKENS,
        )[0]
        per_token = torch.randn(8, NUM_TOKENS, generator=torch.Generator().manual_seed(0))
        loss = plain._compute_loss(plain.model, {**batch, "advantages": per_token})
    assert loss.item() == pytest.approx(-per_token.mean().item(), abs=1e-6), (
        "_compute_loss no longer multiplies (B, T) advantages token by token; StageTrainer hands it M * A"
    )


def test_rewards_come_gathered_one_column_a_function(checkpoint, tmp_path):
    def sometimes(prompts, **_):
        return [None, *[2.0] * (len(prompts) - 1)]

    trainer = trl_trainer(checkpoint, tmp_path, rewards=(position, sometimes), reward_weights=[1.0, 0.4])
    rows = rows_of(trainer)
    rewards = trainer._calculate_rewards(rows, [row["prompt"] for row in rows], [""] * 8, [[0] * NUM_TOKENS] * 8)
    expected = torch.tensor([[float(i), 2.0 if i else torch.nan] for i in range(8)])
    message = (
        f"_calculate_rewards returns {rewards} instead of (N, F) with NaN for None; StageTrainer._calculate_rewards "
        "fills the last column with the entropy reward"
    )
    torch.testing.assert_close(rewards, expected, atol=0, rtol=0, equal_nan=True, msg=message)
    # The weighted sum of the columns, then TRL's group normalisation: what a changed last column acts through.
    advantages = trainer._generate_and_score_completions(rows)["advantages"]
    total = torch.arange(8.0) + 0.8 * torch.tensor([0.0] + [1.0] * 7)
    groups = total.view(2, 4)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    message = "TRL's advantages are no longer (r - mean) / (std + 1e-4) of the weighted rewards; see objective"
    torch.testing.assert_close(advantages, expected.flatten(), atol=1e-6, rtol=0, msg=message)


def test_extra_keys_of_a_rollout_reach_the_rewards_sample_by_sample(checkpoint, tmp_path):
    seen, rolled = {}, {}

    def reward(prompts, **others):
        seen.update(others)
        return position(prompts)

    def roll_out(prompts, trainer):
        rolled.update(scripted_rollout(prompts, trainer))
        return dict(rolled)

    trainer = trl_trainer(checkpoint, tmp_path, rewards=(reward,), rollout_func=roll_out)
    output = trainer._generate_and_score_completions(rows_of(trainer))
    for name in ("generated_images", "policy_entropy"):
        assert seen.get(name) == rolled[name], (
            f"the rollout's extra key {name!r} no longer reaches rewards, one value a sample; as_trl_reward and "
            "StageTrainer._calculate_rewards read it"
        )
    assert seen.get("metadata") == ['{"row": 0}'] * 4 + ['{"row": 1}'] * 4, (
        "dataset columns no longer reach rewards, one value a sample; as_trl_reward reads metadata"
    )
    assert output["completion_ids"].tolist() == rolled["completion_ids"], "TRL changes the codes of sample_images"
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(output["prompt_ids"], output["prompt_mask"])]
    assert prompts == rolled["prompt_ids"], "TRL changes the prompts of sample_images"


def test_the_fused_head_calls_base_model_and_the_output_embedding_each_time(policy, prompt_ids):
    """Swapping the head after patching must be seen: that is what scoring by the image head rests on."""
    ids, mask = left_pad(prompt_ids[:2], policy.pad_token_id)
    ids = torch.cat([ids, torch.zeros(2, NUM_TOKENS, dtype=torch.long)], dim=1)
    mask = policy.attention_mask_with_image(mask)
    add_fused_lm_head(policy, cast_lm_head_to_fp32=True, outputs=("log_probs", "entropy"))
    with torch.no_grad():
        policy.get_output_embeddings().weight.zero_()
        out = policy(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True)
    uniform = torch.log(torch.tensor(512.0))
    message = "add_fused_lm_head no longer runs model.base_model and model.get_output_embeddings(); see ImagePolicy"
    torch.testing.assert_close(out.log_probs, -uniform.expand_as(out.log_probs), atol=1e-5, rtol=0, msg=message)
    torch.testing.assert_close(out.entropy, uniform.expand_as(out.entropy), atol=1e-5, rtol=0, msg=message)


def test_the_fused_head_takes_as_many_tokens_at_a_time_as_it_is_told(policy, prompt_ids, monkeypatch):
    """On CPUs the trainer makes the tiles smaller: the memory of a step depends on it, its numbers do not."""
    ids, mask = left_pad(prompt_ids[:2], policy.pad_token_id)
    ids = torch.cat([ids, torch.arange(2 * NUM_TOKENS).view(2, -1)], dim=1)
    mask = policy.attention_mask_with_image(mask)
    add_scoring_head(policy, 1.0, torch.device("cpu"))
    message = "TOKEN_CHUNK_SIZE no longer sets the tokens of a tile; see policy.scoring_head"
    assert chunked_logprob.TOKEN_CHUNK_SIZE == CPU_TOKENS_A_TILE, message
    rows, results = [], []
    monkeypatch.setattr(
        chunked_logprob.torch,
        "empty",
        lambda shape, *a, _empty=torch.empty, **k: (rows.append(shape), _empty(shape, *a, **k))[1],
    )
    for tokens in (4096, 5):
        monkeypatch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", tokens)
        rows.clear()
        with torch.no_grad():
            out = policy(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True)
        results.append((out.log_probs, out.entropy))
        assert max(shape[0] for shape in rows if isinstance(shape, tuple)) == min(tokens, 2 * NUM_TOKENS), message
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=0)


def test_the_reference_is_built_by_a_function_we_can_replace(policy, checkpoint):
    assert grpo_trainer.create_model_from_path is create_model_from_path, (
        "grpo_trainer no longer finds create_model_from_path in its own namespace; trl_seams.reference_of patches it"
    )
    assert "architecture" in parameters(create_model_from_path), (
        "create_model_from_path no longer takes architecture; trl_seams.reference_of passes the policy's class"
    )
    with reference_of(policy):
        built = grpo_trainer.create_model_from_path(checkpoint)
    assert type(built) is type(policy), "create_model_from_path ignores architecture; see trl_seams.reference_of"
    assert grpo_trainer.create_model_from_path is create_model_from_path


def test_trl_knows_the_losses_and_options_that_the_config_names():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    compared = re.findall(r"self\.loss_type (?:==|in) (\[[^\]]*\]|\"\w+\")", source)
    known = {name for part in compared for name in re.findall(r"\"(\w+)\"", part)}
    assert known == set(CHOICES["loss_type"]), f"TRL's losses are now {sorted(known)}; correct presets.CHOICES"
    missing = UNSUPPORTED.keys() - {*parameters(GRPOConfig), "log_completions"}
    assert not missing, f"GRPOConfig has no {missing} any more; correct presets.UNSUPPORTED"


def test_generation_may_be_unwrapped_as_trl_itself_does():
    needed = {"gather_deepspeed3_params", "gradient_checkpointing_kwargs"}
    assert needed <= parameters(unwrap_model_for_generation), (
        f"unwrap_model_for_generation now takes {list(parameters(unwrap_model_for_generation))}; "
        "trl_seams.sample_images passes " + ", ".join(sorted(needed))
    )


def test_prompts_come_in_groups_of_neighbours(plain):
    """Plain prompts, each repeated num_generations times: what sample_images shares prefixes by."""
    order = [plain.train_dataset[i]["prompt"] for i in plain._get_train_sampler()]
    groups = [order[i : i + 4] for i in range(0, 16, 4)]
    assert all(len(set(group)) == 1 for group in groups) and {group[0] for group in groups} == set(PROMPTS), (
        "TRL's sampler no longer repeats each prompt num_generations times in a row; StageTrainer._group_size"
    )
