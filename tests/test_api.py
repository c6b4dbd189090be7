"""From a prompt to a result."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import T5Config

import fasttrace
from fasttrace import EngineError, ModelError, PlanError, PromptError
from tests.conftest import tiny_model
from tests.helpers.tokenizers import Slow, byte_level
from tests.helpers.tracers import PROMPT, tracer_with_text


def trace(tracer=None, **options):
    options = {"subject": "The Space Needle", "target": " Seattle", "samples": 2, "window": 3} | options
    return (tracer or tracer_with_text()).trace(options.pop("prompt", PROMPT), **options)


def test_a_trace_has_three_grids_of_blocks_by_positions(family):
    result = trace(tracer_with_text(family))
    assert result.streams == fasttrace.STREAMS
    for stream in result.streams:
        assert result.grid(stream).shape == (4, 7)
    assert result.target == " Seattle"
    assert result.windows == {"block_output": 1, "mlp_activation": 3, "attention_output": 3}
    assert result.metadata["engine"] == "wavefront"
    assert "self-check" in result.metadata["engine_reason"]


def test_known_cells_have_their_base_scores(family):
    result = trace(tracer_with_text(family), subject="Needle")
    for stream in result.streams:
        np.testing.assert_array_equal(result.grid(stream)[:, :2], result.corrupted_prob)
    block_output = result.grid("block_output")
    assert block_output[-1, -1] == pytest.approx(result.clean_prob)
    np.testing.assert_array_equal(block_output[-1, :-1], result.corrupted_prob)


def test_restoring_the_mlp_activation_equals_restoring_its_output(family):
    result = trace(tracer_with_text(family), streams=("mlp_activation", "mlp_output"), engine="reference")
    np.testing.assert_allclose(result.grid("mlp_activation"), result.grid("mlp_output"), rtol=1e-5)


@pytest.mark.parametrize("engine", ["auto", *fasttrace.ENGINES])
def test_every_engine_can_be_named(family, engine):
    tracer = tracer_with_text(family)
    expected = trace(tracer, engine="reference")
    result = trace(tracer, engine=engine)
    for stream in result.streams:
        np.testing.assert_allclose(result.grid(stream), expected.grid(stream), rtol=1e-5)
    assert result.clean_prob == pytest.approx(expected.clean_prob)
    assert result.corrupted_std == pytest.approx(expected.corrupted_std, rel=1e-3)
    np.testing.assert_allclose(result.prob_std["block_output"], expected.prob_std["block_output"], atol=1e-6)


def test_a_bos_token_is_a_position_of_the_grid(family):
    tracer = tracer_with_text(family, bos=True)
    result = trace(tracer)
    assert result.tokens[0] == "<s>"
    assert result.span == (1, 5)
    np.testing.assert_allclose(
        result.grid("attention_output"), trace(tracer, engine="reference").grid("attention_output"), rtol=1e-5
    )


def test_token_ids_need_no_tokenizer(family):
    result = fasttrace.Tracer(tiny_model(family)).trace([5, 6, 7, 8], subject=(0, 2), samples=1)
    assert result.target is None
    assert result.target_id == result.top["clean"][0][0]
    assert result.tokens == ("5", "6", "7", "8")


def test_top_tokens_are_the_models_distribution(family):
    tracer = tracer_with_text(family)
    result = trace(tracer)
    ids = torch.tensor([result.token_ids])
    expected = tracer.model(input_ids=ids).logits[0, -1].softmax(-1)
    top = result.top_tokens("clean", n=10)
    assert top["id"].tolist() == expected.topk(10).indices.tolist()
    np.testing.assert_allclose(top["prob"], expected.topk(10).values.detach().numpy(), rtol=1e-5)
    assert (result.top_tokens("corrupted", n=10)["id"].tolist()) != top["id"].tolist()


def test_noise_of_zero_restores_nothing(family):
    result = trace(tracer_with_text(family), noise=0.0)
    assert result.corrupted_prob == pytest.approx(result.clean_prob)
    np.testing.assert_allclose(result.grid("block_output"), result.clean_prob, rtol=1e-5)


def test_noise_subjects_set_the_deviation_and_text_or_ids_say_the_same():
    tracer = tracer_with_text()
    text = trace(tracer, noise_subjects=["The Space", "Seattle"])
    ids = [tracer.tokenizer(word)["input_ids"] for word in ("The Space", "Seattle")]
    assert text.metadata["sigma"] == trace(tracer, noise_subjects=ids).metadata["sigma"]
    assert text.metadata["sigma"] != trace(tracer).metadata["sigma"]


@pytest.mark.parametrize("budget", [1, 20, 40, 100, 10**6])
def test_any_budget_gives_the_same_grids(family, budget):
    tracer = tracer_with_text(family)
    expected = trace(tracer, samples=3, budget=10**9)
    result = trace(tracer, samples=3, budget=budget)
    for stream in result.streams:
        np.testing.assert_allclose(result.grid(stream), expected.grid(stream), rtol=1e-5)
        np.testing.assert_allclose(result.prob_std[stream], expected.prob_std[stream], atol=1e-6)
    assert result.top["clean"][0][0] == expected.top["clean"][0][0]


def test_a_budget_bounds_the_pack(family, monkeypatch):
    from fasttrace.engines import ENGINES, wavefront

    peaks = []
    right = ENGINES["wavefront"]

    def recorded(anatomy, job, tick):
        peaks.append(job.plan(anatomy.n_layers, wavefront.LAYOUT).peak_tokens)
        return right(anatomy, job, tick)

    tracer = tracer_with_text(family)
    trace(tracer, engine="wavefront")  # the self-check has packs of its own
    monkeypatch.setitem(ENGINES, "wavefront", replace(ENGINES["wavefront"], run=recorded))
    trace(tracer, samples=3, budget=60, engine="wavefront")
    assert len(peaks) > 3
    assert max(peaks) <= 60


def test_progress_is_told_once_per_block_and_ends_at_all():
    steps = []
    trace(progress=lambda done, all_steps: steps.append((done, all_steps)))
    assert steps == [(i + 1, 4) for i in range(4)]


def test_metadata_can_be_written_as_json(family):
    metadata = trace(tracer_with_text(family)).metadata
    assert json.loads(json.dumps(metadata)) == metadata
    assert set(metadata) >= {
        "model",
        "revision",
        "prompt",
        "subject",
        "noise",
        "sigma",
        "samples",
        "seed",
        "dtype",
        "device",
    }
    assert set(metadata["versions"]) >= {"fasttrace", "torch", "transformers"}


def test_the_saving_is_in_the_result():
    cost = trace(samples=1).cost
    assert cost.full_token_blocks == 3 * (4 * 7) ** 2
    assert cost.token_blocks < cost.full_token_blocks / 2
    assert cost.rows < 3 * 4 * 7
    assert cost.flops > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"streams": ("residual",)}, PlanError, "unknown stream"),
        ({"engine": "warp"}, EngineError, "unknown engine 'warp'; choose from auto, wavefront"),
        ({"window": 0}, PlanError, "window is 0"),
        ({"samples": 0}, PlanError, "samples is 0"),
        ({"noise": -1.0}, PlanError, "deviation -1.0"),
        ({"noise": float("nan")}, PlanError, "deviation nan"),
        ({"noise": "loud"}, PlanError, "noise rule 'loud'"),
        ({"budget": 0}, PlanError, "budget is 0"),
        ({"subject": "Eiffel"}, PromptError, "does not occur"),
        ({"prompt": "The " * 40}, PromptError, "positions for 32"),
    ],
)
def test_bad_input_is_an_error_before_anything_is_traced(options, error, message, monkeypatch):
    from fasttrace.engines import ENGINES

    tracer = tracer_with_text()
    tracer.choose_engine()  # its self-check runs the engines
    for name in ENGINES:
        monkeypatch.setitem(ENGINES, name, replace(ENGINES[name], run=lambda *_: pytest.fail("an engine ran")))
    with pytest.raises(error, match=message):
        trace(tracer, **options)


def test_a_local_folder_is_loaded_by_its_path(tmp_path):
    tracer = tracer_with_text("llama")
    tracer.model.save_pretrained(tmp_path)
    tracer.tokenizer.save_pretrained(tmp_path)
    loaded = fasttrace.Tracer.from_pretrained(str(tmp_path))
    assert loaded.name == tmp_path.name
    assert loaded.dtype == torch.float32
    np.testing.assert_allclose(trace(loaded).grid("block_output"), trace(tracer).grid("block_output"), rtol=1e-5)


def test_float16_on_a_cpu_becomes_bfloat16_and_says_so(tmp_path, caplog):
    tracer_with_text("llama").model.save_pretrained(tmp_path)
    loaded = fasttrace.Tracer.from_pretrained(str(tmp_path), dtype="float16", device="cpu")
    assert loaded.dtype == torch.bfloat16
    assert "using bfloat16" in caplog.text
    assert loaded.trace([1, 2, 3], subject=(0, 1), samples=1).metadata["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "unknown dtype 'int8'; choose from auto, float16"),
        ({"device": "tpu9"}, "unknown device 'tpu9'"),
        ({"device": "cuda:99"}, "torch sees . GPUs"),
    ],
)
def test_dtypes_and_devices_that_are_not_there_are_errors(tmp_path, options, message):
    with pytest.raises(ModelError, match=message):
        fasttrace.Tracer.from_pretrained(str(tmp_path), **options)


def test_a_model_that_is_nowhere_is_one_clear_sentence(tmp_path):
    with pytest.raises(
        ModelError, match="cannot be fetched; check the name and the network, or use the embedded model"
    ):
        fasttrace.Tracer.from_pretrained(str(tmp_path / "nothing"))


def test_an_encoder_decoder_folder_is_refused_before_its_weights_are_read(tmp_path):
    T5Config(num_layers=1, d_model=8).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="encoder-decoder"):
        fasttrace.Tracer.from_pretrained(str(tmp_path))


def test_a_padded_vocabulary_ends_no_trace():
    tokenizer = Slow()
    model = tiny_model("llama", vocab_size=len(tokenizer) + 50)
    result = fasttrace.Tracer(model, tokenizer).trace([4, 12, 13], subject=(0, 2), target=len(tokenizer) + 3, samples=1)
    assert result.target == f"<{len(tokenizer) + 3}>"
    assert {text for token, text, _ in result.top["clean"] if token >= len(tokenizer)}


def test_what_is_no_tokenizer_is_refused_in_the_constructor():
    with pytest.raises(ModelError, match=r"wrap it, transformers.PreTrainedTokenizerFast"):
        fasttrace.Tracer(tiny_model("gpt2"), byte_level().backend_tokenizer)


def test_one_text_is_one_subject_to_measure_the_noise_on():
    tracer = tracer_with_text()
    one, listed, letters = (
        trace(tracer, noise_subjects=s).metadata["sigma"] for s in (" Space", [" Space"], list(" Space"))
    )
    assert one == listed != letters
