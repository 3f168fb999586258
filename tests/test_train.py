"""train.py against torch's optimizers, an SVD, formulas, and itself killed half-way."""

import gzip
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--num-layers", "2", "--d-model", "32", "--d-ff", "64", "--num-heads", "2",
        "--context-length", "32", "--batch-size", "4", "--vocab-size", "300", "--compile", "off",
        "--dtype", "fp32", "--sample-prompts", "--log-every", "5"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Forty small documents of arithmetic: something a tiny model can learn."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        lines = [f"{a} plus {i} makes {a + i}." for a in range(40)]
        (folder / f"{i:02d}.txt").write_text("\n".join(lines))
    return folder


def run(corpus, out, *flags, steps=12, launcher=(), check=True):
    """train.py as a user starts it, in its own process."""
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *TINY, "--data", str(corpus),
               "--out", str(out), "--cache", str(corpus.parent / "cache"), "--steps", str(steps),
               "--warmup", "2", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert not check or done.returncode == 0, done.stderr
    return done


def losses(out):
    records = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [r["loss"] for r in records if "loss" in r]


def weights(out):
    return load_file(Path(out) / "model.safetensors")


def val_loss(out):
    records = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [r["val_loss"] for r in records if "val_loss" in r][-1]


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    run(corpus, out, "--save-every", "4")
    return out


# ---- optimizers ----------------------------------------------------------------------------------


def steps_of(make, seed=0, steps=100):
    """Weights after `steps` updates of a small regression, in float64."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    net = net.double()
    x, y = torch.randn(20, 6).double(), torch.randn(20, 3).double()
    optimizer = make(net.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_adamw_is_torchs():
    options = dict(lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    ours = steps_of(lambda p: train.AdamW(p, **options))
    theirs = steps_of(lambda p: torch.optim.AdamW(p, **options))
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-6)


def test_compiled_adamw_is_the_eager_one():
    options = dict(lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    compiled = steps_of(lambda p: train.AdamW(p, **options).compile(), steps=20)
    theirs = steps_of(lambda p: torch.optim.AdamW(p, **options), steps=20)
    torch.testing.assert_close(compiled, theirs, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("momentum,decay", [(0.0, 0.0), (0.9, 0.0), (0.9, 0.05)])
def test_sgd_is_torchs(momentum, decay):
    options = dict(lr=0.05, momentum=momentum, weight_decay=decay)
    ours = steps_of(lambda p: train.SGD(p, **options))
    theirs = steps_of(lambda p: torch.optim.SGD(p, **options))
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-6)


def test_newton_schulz_does_not_blow_up_where_one_value_is_all_there_is():
    """Of a matrix of rank one the largest singular value is its whole norm, at the end of POLAR's
    range; the others are bf16's rounding, amplified."""
    torch.manual_seed(0)
    one = torch.randn(64, 1) @ torch.randn(1, 32)
    values = torch.linalg.svdvals(train.newton_schulz(torch.stack([one, 1e3 * one])).float())
    assert 0.6 < values[:, 0].min() and values.max() < 1.3, values


def test_coefficients_of_newton_schulz_keep_their_promise():
    x = torch.logspace(math.log10(0.004), math.log10(1.02), 10_000, dtype=torch.float64)
    for a, b, c in train.POLAR:
        x = a * x + b * x**3 + c * x**5
    assert 0.76 < x.min() and x.max() < 1.04


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48)])
def test_newton_schulz_keeps_the_singular_vectors_and_flattens_the_values(shape):
    torch.manual_seed(0)
    G = torch.randn(3, *shape)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    rotated = U.mT @ train.newton_schulz(G).float() @ Vh.mT  # diagonal: same singular vectors
    values = rotated.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.6 and values.max() < 1.3, (values.min(), values.max())
    off_diagonal = rotated - torch.diag_embed(values)
    assert off_diagonal.abs().max() < 0.1
    assert S.max() / S.min() > 3  # the test would see a function that does nothing


def test_muon_steps_by_the_polar_factor():
    """First step: buffer = (1 - mu) g, so the Nesterov mix is a multiple of g."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(24, 8))
    before, p.grad = p.detach().clone(), torch.randn(24, 8)
    U, _, Vh = torch.linalg.svd(p.grad, full_matrices=False)
    train.Muon([p], lr=0.1, weight_decay=0.5).step()
    change = (before * (1 - 0.1 * 0.5) - p.detach()) / (0.1 * math.sqrt(24 / 8))
    assert (change - U @ Vh).norm() / (U @ Vh).norm() < 0.3
    cosine = torch.nn.functional.cosine_similarity(change.flatten(), (U @ Vh).flatten(), 0)
    assert cosine > 0.97


def test_clip_grad_norm_is_torchs():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.zeros(5, 3)), torch.nn.Parameter(torch.zeros(7))]
    theirs = [torch.nn.Parameter(torch.zeros(5, 3)), torch.nn.Parameter(torch.zeros(7))]
    for a, b in zip(ours, theirs):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    norm = train.clip_grad_norm(ours, 1.5)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, 1.5))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad)


# ---- schedules -----------------------------------------------------------------------------------


def test_cosine_schedule_at_its_corners():
    at = [train.cosine_schedule(s, 1.0, 0.1, 10, 110) for s in (0, 5, 10, 60, 110, 111, 500)]
    assert at == pytest.approx([0, 0.5, 1.0, 0.55, 0.1, 0.1, 0.1])
    quarter = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
    assert train.cosine_schedule(35, 1.0, 0.1, 10, 110) == pytest.approx(quarter)


def test_wsd_schedule_at_its_corners():
    at = [train.wsd_schedule(s, 2.0, 0.0, 10, 40, 100) for s in (0, 5, 10, 59, 60, 80, 100, 120)]
    assert at == pytest.approx([0, 1, 2, 2, 2, 1, 0, 0])


# ---- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 1000])
def test_shuffled_is_a_permutation(n):
    order = [train.shuffled(i, n, "a") for i in range(n)]
    assert sorted(order) == list(range(n))
    assert n < 17 or order != [train.shuffled(i, n, "b") for i in range(n)] != list(range(n))


def test_every_window_comes_once_an_epoch_from_every_shard():
    shards = [np.arange(100, dtype=np.uint16), np.arange(1000, 1050, dtype=np.uint16)]
    windows = train.Windows(shards, 8, seed=0)
    for epoch in (0, 1, 2):
        seen = [windows.window(epoch * windows.per_epoch + i) for i in range(windows.per_epoch)]
        starts = [int(w[0]) for w in seen]
        assert len(set(starts)) == len(starts) == windows.per_epoch
        assert all(len(w) == 9 and (np.diff(w.astype(int)) == 1).all() for w in seen)
        inputs = {int(t) for w in seen for t in w[:-1]}
        assert len(inputs) == 8 * len(seen)  # no token is an input twice in an epoch
    inputs, targets = windows.batch([0, 5], torch.device("cpu"))
    assert inputs.shape == targets.shape == (2, 8) and inputs.dtype == torch.int64
    assert (targets == inputs + 1).all()


def test_packed_windows_begin_with_documents():
    eot = 9
    #         0  1  2    3  4  5  6  7  8  9 10 11   12 13    14 15 16
    tokens = [1, 2, 9,   1, 2, 3, 4, 5, 6, 7, 8, 9,  1, 9,    1, 2, 9]
    starts = train.document_starts(np.array(tokens), eot, 4)
    # 0 sees the first document whole and the second's start; 3 and 7 read the long one through;
    # the document at 12 begins inside window 11, which 11 would start on its <|endoftext|>
    assert starts.tolist() == [0, 3, 7, 11, 12]
    windows = train.Windows([np.array(tokens)], 4, 0, eot)
    seen = sorted(tuple(windows.window(i)[:4]) for i in range(windows.per_epoch))
    assert seen == sorted(tuple(tokens[s:s + 4]) for s in starts)


def test_get_batch_covers_every_start():
    inputs, targets = train.get_batch(np.arange(20), 4000, 7, "cpu")
    assert (targets == inputs + 1).all()
    counts = torch.bincount(inputs[:, 0], minlength=13)
    assert len(counts) == 13 and counts.min() > 200  # 4000 / 13 = 308 each


def test_token_files_of_all_three_kinds(tmp_path):
    ids = np.array([5, 1, 65535, 7], np.uint16)
    np.save(tmp_path / "a.npy", ids)
    ids.tofile(tmp_path / "b.bin")
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(ids)
    (tmp_path / "c.bin").write_bytes(header.tobytes() + ids.tobytes())
    for name in ("a.npy", "b.bin", "c.bin"):
        assert train.load_tokens(tmp_path / name).tolist() == ids.tolist()


def test_held_out_share_is_about_right_and_does_not_depend_on_the_other_documents(tmp_path):
    def held_out(name, numbers):
        text = "<|endoftext|>".join(f"document {i}" for i in numbers)
        (tmp_path / name).write_text(text)
        return {d for d, held in train.split_documents([str(tmp_path / name)]) if held}

    every, half = held_out("every.txt", range(4000)), held_out("half.txt", range(1, 4000, 2))
    assert 0.03 < len(every) / 4000 < 0.07
    assert half == {d for d in every if int(d.split()[1]) % 2}


def test_a_single_file_is_split_at_a_line(tmp_path):
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "one.txt").write_text(text)
    parts = {held: d for d, held in train.split_documents([str(tmp_path / "one.txt")])}
    assert parts[False] + parts[True] == text and parts[True].startswith("line")
    assert 0.04 < len(parts[True]) / len(text) < 0.06


def test_some_text_is_held_out_of_any_number_of_documents(tmp_path):
    """By their hashes alone, none of these 30 would be."""
    every = tmp_path / "every.txt"
    every.write_text("<|endoftext|>".join(f"document {i}\n" * 20 for i in range(250)))
    documents = [d for d, held_out in train.split_documents([str(every)]) if not held_out]
    assert 200 < len(documents) < 250
    few = tmp_path / "few.txt"
    few.write_text("<|endoftext|>".join(documents[:30]))
    assert sum(len(d) for d, held_out in train.split_documents([str(few)]) if held_out) > 200


def test_nothing_to_validate_on_is_said_at_once(tmp_path, capsys):
    (tmp_path / "data").mkdir()  # the test's own folder has "val" in its name
    np.save(tmp_path / "data" / "train.npy", np.arange(100, dtype=np.uint16))
    np.save(tmp_path / "data" / "val.npy", np.arange(1, dtype=np.uint16))
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and "too little to validate on" in capsys.readouterr().err


def test_token_files_hold_every_document_and_its_end(tmp_path):
    import tokenizer
    docs = ["first " * 50, "second", "a\nthird\n"]
    vocab, merges = tokenizer.train_bpe(docs, 270, [tokenizer.EOT])
    tok = tokenizer.Tokenizer(vocab, merges, [tokenizer.EOT])
    assert train.write_tokens(tmp_path / "t.npy", docs, tok) == len(np.load(tmp_path / "t.npy"))
    ids = train.load_tokens(tmp_path / "t.npy")
    assert tok.decode(ids.tolist()) == tokenizer.EOT.join([*docs, ""])
    assert ids.dtype == np.uint16 and (ids == tok.eot_id).sum() == 3


# ---- training ------------------------------------------------------------------------------------


def test_loss_falls_and_the_checkpoint_is_complete(corpus, undisturbed):
    curve = losses(undisturbed)
    assert len(curve) == 12 and curve[-1] < curve[0] - 0.2
    # the blocks of a new model add nothing: normed rows of the one table, times the table
    state = torch.load(undisturbed / "train_state.pt", weights_only=True)
    tokens = np.load(corpus.parent / "cache" / state["settings"]["data_name"] / "train.npy")
    inputs, targets = train.Windows([tokens], 32, 0).batch(range(4), torch.device("cpu"))
    torch.manual_seed(0)
    table = train.model_py.Embedding(300, 32, std=32**-0.5).weight
    logits = F.rms_norm(table[inputs], (32,), eps=1e-6) @ table.T
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert curve[0] == pytest.approx(expected, abs=1e-4)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                 "train_state.pt", "loss.png"):
        assert (undisturbed / name).stat().st_size > 50
    assert [p.name for p in train.step_folders(undisturbed)][-1] == "step-000012"


def test_one_batch_is_learned_by_heart(tmp_path):
    """A corpus of one window: the loss goes under 0.01."""
    np.save(tmp_path / "one-train.npy", np.random.default_rng(0).integers(0, 50, 65, np.uint16))
    np.save(tmp_path / "one-val.npy", np.arange(40, dtype=np.uint16))
    flags = [f for f in TINY if f not in ("--vocab-size", "300")]
    train.main([*flags, "--vocab-size", "50", "--data", str(tmp_path / "*.npy"), "--steps", "200",
                "--context-length", "32", "--out", str(tmp_path / "out"), "--lr", "0.01",
                "--save-every", "0", "--eval-every", "0"])
    assert losses(tmp_path / "out")[-1] < 0.01


def test_a_run_killed_and_continued_is_the_same_run(corpus, undisturbed, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "train.py"), *TINY, "--data", str(corpus), "--out",
               str(out), "--cache", str(corpus.parent / "cache"), "--steps", "12", "--warmup", "2",
               "--save-every", "4", "--eval-every", "0"]
    victim = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while victim.poll() is None and not train.step_folders(out):
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    (out / "saving").mkdir(exist_ok=True)  # what a kill in the middle of a save leaves behind
    (out / "saving" / "model.safetensors").write_bytes(b"torn")
    with open(out / "log.jsonl", "a") as f:
        f.write('{"step": 11, "loss": 0.1}\n{"step"')
    run(corpus, out, "--save-every", "4", "--eval-every", "0")
    assert losses(out) == losses(undisturbed) and not (out / "saving").exists()
    a, b = weights(out), weights(undisturbed)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_accumulation_and_ranks_do_not_change_the_run(corpus, tmp_path):
    """With plain SGD: Muon and AdamW would hide a gradient of the wrong scale."""
    sgd = ("--optimizer", "sgd", "--lr", "0.3", "--momentum", "0.9")
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
                str(20000 + os.getpid() % 20000))
    run(corpus, tmp_path / "one", *sgd)
    run(corpus, tmp_path / "micro", *sgd, "--micro-batch", "1")
    run(corpus, tmp_path / "ranks", *sgd, launcher=launcher)
    expected = losses(tmp_path / "one")
    assert expected[-1] < expected[0] - 0.05
    for name in ("micro", "ranks"):
        assert losses(tmp_path / name) == pytest.approx(expected, abs=2e-5)
        assert val_loss(tmp_path / name) == pytest.approx(val_loss(tmp_path / "one"), abs=2e-5)


def test_sigterm_saves_first(corpus, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *TINY, "--data", str(corpus), "--out",
               str(tmp_path / "out"), "--cache", str(corpus.parent / "cache"), "--steps", "100000",
               "--save-every", "0"]
    victim = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in victim.stdout:
        if "5/100000" in line:
            break
    victim.send_signal(signal.SIGTERM)
    rest = victim.communicate(timeout=60)[0]
    assert victim.returncode == 0 and "stopped at step" in rest
    step = int(train.step_folders(tmp_path / "out")[-1].name[5:])
    assert 5 <= step < 100000


def test_a_finished_run_says_how_to_go_on_and_a_different_one_is_refused(corpus, undisturbed):
    assert "--steps 24 goes on" in run(corpus, undisturbed).stdout
    done = run(corpus, undisturbed, "--lr", "0.5", check=False)
    assert done.returncode == 2 and "--lr 0.024" in done.stderr and "--restart" in done.stderr
    done = run(corpus, undisturbed, "--no-qk-norm", "--betas", "0.8", "0.9", check=False)
    assert "a run with --qk-norm, --betas 0.9 0.95;" in done.stderr  # as one would type them


def test_more_steps_branch_off_where_the_rate_was_full(corpus, tmp_path):
    """A WSD run of 12 steps begins to fall at 7; asked for 24, the same as 24 from the start."""
    flags = ("--save-every", "0", "--eval-every", "0", "--decay", "0.5")
    run(corpus, tmp_path / "a", *flags, steps=12)
    assert [p.name for p in train.step_folders(tmp_path / "a")] == ["step-000007", "step-000012"]
    assert "from step 7" in run(corpus, tmp_path / "a", *flags, steps=24).stdout
    run(corpus, tmp_path / "b", *flags, steps=24)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_finished_run_has_its_last_validation_in_the_log(corpus, tmp_path, monkeypatch):
    """Or a kill just after the last save would leave a run that is never evaluated."""
    saved = []

    def save(run):
        saved.append(json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1]))

    monkeypatch.setattr(train, "save_run", save)
    train.main([*TINY, "--data", str(corpus), "--cache", str(corpus.parent / "cache"), "--steps",
                "3", "--save-every", "1", "--out", str(tmp_path)])
    assert ["val_loss" in record for record in saved] == [False, False, True]


def test_micro_batches_shrink_until_they_fit_and_stay_so(corpus, tmp_path, monkeypatch, capsys):
    """A GPU's memory runs out above one window; the run goes on as it found, also elsewhere."""
    real, sizes = train.distributed.Parallel.loss, []

    def small_gpu(parallel, inputs, targets, backward_scale=None, **options):
        if backward_scale is None:
            return real(parallel, inputs, targets, **options)
        sizes.append(len(inputs))
        if sizes[-1] > limit:
            raise torch.cuda.OutOfMemoryError
        return real(parallel, inputs, targets, backward_scale=backward_scale, **options)

    monkeypatch.setattr(train.distributed.Parallel, "loss", small_gpu)
    flags = [*TINY, "--data", str(corpus), "--cache", str(corpus.parent / "cache"), "--out",
             str(tmp_path), "--warmup", "0", "--decay", "1"]
    limit = 1
    train.main([*flags, "--steps", "2"])
    # refused twice, then two batches of four to warm up and one in each step
    assert sizes == [4, 2] + [1] * 4 * 4 and len(losses(tmp_path)) == 2
    limit = 4
    train.main([*flags, "--steps", "4"])
    assert len(losses(tmp_path)) == 4 and set(sizes[2:]) == {1}
    limit = 0
    with pytest.raises(SystemExit):
        train.main([*flags, "--restart"])
    assert "--micro-batch 1: does not fit" in capsys.readouterr().err


def test_tokens_another_run_has_written_meanwhile_are_kept(corpus, tmp_path):
    """Two runs may tokenise the same text at once: the first may read its files already."""
    files = sorted(map(str, corpus.glob("*.txt")))
    seen = []
    for _ in range(2):
        train.tokenize_corpus(files, tmp_path / "cache", 300, None)
        seen.append([f.stat().st_ino for f in sorted((tmp_path / "cache").iterdir())])
    assert seen[0] == seen[1] and len(list(tmp_path.iterdir())) == 1


def test_a_tokenizer_that_has_changed_is_not_taken_from_the_cache(corpus, tmp_path):
    import tokenizer
    (tmp_path / "tok").mkdir()
    args = train.make_parser().parse_args(["--data", str(corpus), "--tokenizer", str(
        tmp_path / "tok"), "--cache", str(tmp_path / "cache")])
    for size in (270, 280):
        vocab, merges = tokenizer.train_bpe(str(corpus), size, [tokenizer.EOT])
        tokenizer.Tokenizer(vocab, merges, [tokenizer.EOT]).save(tmp_path / "tok")
        assert train.prepare_data(args).tokenizer.vocab_size == size


def test_another_shape_of_the_run_is_refused(corpus, undisturbed):
    done = run(corpus, undisturbed, "--d-ff", "96", steps=24, check=False)
    assert done.returncode == 2 and "--d-ff 64" in done.stderr


def test_a_torn_checkpoint_is_named(corpus, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "out")
    state = train.step_folders(tmp_path / "out")[-1] / "train_state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    done = run(corpus, tmp_path / "out", steps=24, check=False)
    assert done.returncode == 2 and "train_state.pt: cannot be read" in done.stderr
    assert done.stderr.count("\n") == 1


def test_save_and_load_checkpoint_work_on_any_module_and_file_object(tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    other = torch.nn.Linear(3, 2)
    other_optimizer = torch.optim.AdamW(other.parameters())
    file = io.BytesIO()
    for out in (file, tmp_path / "c.pt"):
        train.save_checkpoint(net, optimizer, 7, out)
    file.seek(0)
    for src in (file, tmp_path / "c.pt"):
        assert train.load_checkpoint(src, other, other_optimizer) == 7
    assert torch.equal(net.weight, other.weight)
    assert other_optimizer.state_dict()["state"][0]["step"] == 1
    assert os.listdir(tmp_path) == ["c.pt"]


def test_bits_per_byte_against_a_hand_count(tmp_path):
    """A model of zeros gives every id 1 / V: bits = log2(V) * tokens / bytes."""
    import tokenizer
    tok = tokenizer.Tokenizer({**{i: bytes([i]) for i in range(256)}, 256: b"ab", 257: b"<|e|>"},
                              [(b"a", b"b")], ["<|e|>"])

    class Zeros(torch.nn.Module):
        def loss(self, ids, targets):
            return torch.nn.functional.cross_entropy(
                torch.zeros(targets.numel(), 258), targets.flatten(), reduction="sum")

    val = np.array([97, 256, 256, 98, 257, 256, 97, 97, 97], np.uint16)
    zeros, ns = Zeros(), train.argparse.Namespace
    zeros.data_ranks = 0, 1, 1
    run = ns(parallel=zeros, device=torch.device("cpu"), data=ns(val=[val], tokenizer=tok),
             args=ns(context_length=4, micro_batch=3, vocab_size=258))
    loss, bits = train.evaluate(run)
    # targets: 256 256 98 257 | 256 97 97 97 = 8 tokens of 2 + 2 + 1 + 0 + 2 + 1 + 1 + 1 bytes
    assert loss == pytest.approx(math.log(258), rel=1e-6)
    assert bits == pytest.approx(8 * math.log2(258) / 10, rel=1e-6)
    run.data.val = [val[:2], val[:4], val[:3]]  # none fills a window: 256 256 98, 5 bytes
    assert train.evaluate(run)[1] == pytest.approx(3 * math.log2(258) / 5, rel=1e-6)


# ---- a user's mistakes ---------------------------------------------------------------------------


@pytest.mark.parametrize("flags,words", [
    (["--data", "nowhere.txt"], ["nowhere.txt"]),
    (["--data", "EMPTY"], ["empty.txt"]),
    (["--data", "BINARY"], ["binary.txt"]),
    (["--data", "SHORT"], ["--context-length"]),
    (["--sepcial", "1"], ["--sepcial"]),
    (["--num-layer", "1"], ["did you mean --num-layers?"]),
    (["--steps", "0"], ["--steps 0"]),
    (["--init-from", "nowhere"], ["nowhere"]),
    (["--tokenizer", "nowhere.json"], ["nowhere.json"]),
])
def test_mistakes_end_in_one_line(flags, words, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "short.txt").write_text("abc")
    flags = [str(tmp_path / f"{f.lower()}.txt") if f.isupper() else f for f in flags]
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY, "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "c"), *flags])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1, message
    assert all(w in message for w in words), message
    assert not list((tmp_path / "out").glob("model*"))


def test_gz_and_jsonl_are_text_too(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as f:
        for i in range(50):
            f.write(json.dumps({"text": f"document {i} " * 20}) + "\n")
    train.main([*TINY, "--data", str(tmp_path / "a.jsonl.gz"), "--steps", "2", "--out",
                str(tmp_path / "out"), "--cache", str(tmp_path / "cache")])
    assert len(losses(tmp_path / "out")) == 2


def test_a_loss_that_is_not_finite_stops_with_the_last_checkpoint(corpus, tmp_path, capsys):
    flags = [*TINY, "--data", str(corpus), "--cache", str(corpus.parent / "cache"), "--out",
             str(tmp_path / "out"), "--steps", "40", "--save-every", "1", "--optimizer", "sgd",
             "--lr", "1e20", "--warmup", "0"]
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    assert stop.value.code == 2 and "last good checkpoint" in capsys.readouterr().err
    assert all(v.isfinite().all() for v in weights(tmp_path / "out").values())


def test_steps_that_are_not_finite_are_skipped_by_flag(corpus, tmp_path, capsys, monkeypatch):
    clean = train.clip_grad_norm
    norms = iter([1.0, math.nan, math.inf, 1.0, 1.0])
    monkeypatch.setattr(train, "clip_grad_norm", lambda p, m: clean(p, m) * next(norms))
    train.main([*TINY, "--data", str(corpus), "--cache", str(corpus.parent / "cache"), "--steps",
                "5", "--out", str(tmp_path), "--nonfinite", "skip", "--log-every", "1"])
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    finite = [r["gnorm"] is not None for r in records if "gnorm" in r]
    assert finite == [True, False, False, True, True]
    assert "2 skipped" in capsys.readouterr().out
    assert all(v.isfinite().all() for v in weights(tmp_path).values())


def test_fp16_finds_its_loss_scale(corpus, tmp_path):
    """A scale far too large overflows and is halved until steps go through; it doubles after 1,000
    steps that did."""
    flags = [*TINY, "--data", str(corpus), "--cache", str(corpus.parent / "cache"), "--out",
             str(tmp_path), "--dtype", "fp16", "--decay", "0", "--warmup", "0"]
    train.main([*flags, "--steps", "8"])
    state = torch.load(tmp_path / "train_state.pt", weights_only=True)
    assert state["loss_scale"] == 2.0**16 / 2**state["skipped"] and state["skipped"] < 8
    state |= {"loss_scale": 4.0, "good_steps": 998, "skipped": 0}
    torch.save(state, tmp_path / "step-000008" / "train_state.pt")
    for steps, scale, good in ((9, 4.0, 999), (10, 8.0, 1000), (11, 8.0, 1001)):
        train.main([*flags, "--steps", str(steps)])
        state = torch.load(tmp_path / "train_state.pt", weights_only=True)
        assert (state["loss_scale"], state["good_steps"], state["skipped"]) == (scale, good, 0)


def test_a_spike_is_reported_and_noise_is_not(corpus, tmp_path, capsys, monkeypatch):
    """Of losses near 2.005 with a deviation of 0.005: 2.02 is noise, 2.1 is not."""
    curve = iter([9.0, *[2.0 + 0.01 * (i % 2) for i in range(50)], 2.02, 2.1])

    def step(run, batch, stopping):
        run.step += 1
        return next(curve), 1.0, 1.0, False

    monkeypatch.setattr(train, "train_step", step)
    train.main([*TINY, "--data", str(corpus), "--cache", str(corpus.parent / "cache"), "--steps",
                "53", "--out", str(tmp_path), "--save-every", "0"])
    spikes = [line for line in capsys.readouterr().out.splitlines() if "loss spike:" in line]
    assert len(spikes) == 1 and spikes[0].split()[0] == "53"
    assert "2.1000 is 18 standard" in spikes[0]


def test_profile_and_memory_show_their_tables(corpus, tmp_path, capsys):
    flags = [*TINY, "--data", str(corpus), "--cache", str(corpus.parent / "cache"), "--out",
             str(tmp_path)]
    train.main([*flags, "--profile"])
    out = capsys.readouterr().out
    assert all(f"\n{part} " in out for part in train.PARTS)
    assert json.loads((tmp_path / "trace-0.json").read_text())["traceEvents"]
    train.main([*flags, "--memory", "--batch-size", "2"])
    table = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines()
                 if line.endswith("MiB"))
    # RMSNorm on (2, 32, 32) fp32: at least its input, once, though attention uses it too
    assert float(table["layer 1 attn_norm"].split()[0]) >= 2 * 32 * 32 * 4 / 2**20 - 0.005
    assert not (tmp_path / "model.safetensors").exists()


def test_other_logs_get_every_record(corpus, tmp_path, monkeypatch, capsys):
    seen = []

    class FakeRun:
        def log(self, record, step):
            seen.append((step, record))

    fake = train.argparse.Namespace(init=lambda **kwargs: FakeRun())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train.main([*TINY, "--data", str(corpus), "--cache", str(corpus.parent / "cache"), "--out",
                str(tmp_path), "--steps", "3", "--wandb", "course", "--sample-every", "2",
                "--sample-prompts", "1 plus", "--sample-tokens", "4"])
    assert [step for step, _ in seen] == [1, 2, 3, 3]
    assert capsys.readouterr().out.count("---- sample 1") == 2  # after two steps and at the end


def test_bench_times_ours_and_the_plain_model(monkeypatch, capsys):
    monkeypatch.setattr(train, "BENCHES", {"cpu": [(32, 1, 2, 64, 300, 16, 2)]})
    with torch.compiler.set_stance("force_eager"):
        train.main(["--bench", "--dtype", "fp32"])
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[1] for row in rows] == ["adamw", "muon"], rows
    assert all(float(row.split()[i]) > 0 for row in rows for i in (4, 7, 8)), rows


def test_transformers_opens_the_checkpoint_and_its_tokenizer(undisturbed):
    transformers = pytest.importorskip("transformers")
    import model
    import tokenizer
    model.import_transformers()
    theirs = transformers.AutoTokenizer.from_pretrained(undisturbed)
    tok = tokenizer.Tokenizer.load(undisturbed)
    text = "def f(x):\n    return 7 plus 12\n\n\n  it's"
    assert theirs(text).input_ids == tok.encode(text)
    ids = torch.tensor([tok.encode(text)[:30]])
    logits = transformers.AutoModelForCausalLM.from_pretrained(undisturbed)(ids).logits
    ours = model.Transformer.from_pretrained(undisturbed)(ids)
    torch.testing.assert_close(ours, logits, atol=1e-5, rtol=1e-4)


def test_signal_handlers_are_given_back(corpus, tmp_path):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    train.main([*TINY, "--data", str(corpus), "--cache", str(corpus.parent / "cache"), "--steps",
                "1", "--out", str(tmp_path)])
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
