"""The README's ten commands, small: crawl files to a chat model, through the scripts' main()."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import align
import distributed
import evaluate
import filter_data
import model
import scaling
import tokenizer
import train

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--num-layers", "2", "--d-model", "48", "--d-ff", "96", "--num-heads", "2", "--batch-size",
        "4", "--context-length", "128", "--compile", "off", "--dtype", "fp32", "--log-every", "20"]


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    folder, before = tmp_path_factory.mktemp("course"), os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def test_1_filter(course, capsys):
    assert filter_data.main(["demo", "--out", "crawl"]) == 0
    assert len(list(Path("crawl").glob("*.warc.gz"))) == 4
    assert filter_data.main([
        "run", "--input", "crawl/*.warc.gz", "--language-model", "crawl/language.bin", "--keep",
        "first", "--min-words", "20", "--vocab-size", "600", "--out", "clean"]) == 0
    told = capsys.readouterr().out
    for removed in ("fr", "de", "es", "gopher: words", "repetition:", "near-duplicate of another"):
        assert removed in told, removed
    rows = [json.loads(line) for f in Path("clean/minhash").glob("*.jsonl.gz")
            for line in filter_data.gzip.open(f, "rt", encoding="utf-8")]
    text = "\n".join(row["text"] for row in rows)
    assert len(rows) > 200 and len({row["text"] for row in rows}) == len(rows)
    assert "|||EMAIL_ADDRESS|||" in text and "@example.org" not in text
    assert "|||IP_ADDRESS|||" in text and "192.0.2." not in text
    assert "buy now" not in text and "Menschen" not in text and "derechos" not in text


def test_2_tokenize(course):
    tokenizer.main(["train", "clean/minhash/*.jsonl.gz", "--vocab-size", "600", "--out", "tok"])
    tokenizer.main(["encode", "clean/minhash/*.jsonl.gz", "--tokenizer", "tok", "--out", "ids.npy"])
    ids, tok = np.load("ids.npy"), tokenizer.Tokenizer.load("tok")
    first = json.loads(filter_data.gzip.open(
        sorted(Path("clean/minhash").glob("*.jsonl.gz"))[0], "rt", encoding="utf-8").readline())
    assert ids.dtype == np.uint16 and tok.vocab_size == 600
    assert tok.decode(ids[:4000].tolist()).startswith(first["text"][:500])


def test_3_plan(course, capsys):
    scaling.main(["plan", "--budget-minutes", "20"])
    distributed.main(["plan", "--model", "1b", "--gpus", "8", "--tokens-per-step", "524288"])
    model.main(["account", "--model", "gpt2-xl"])
    told = capsys.readouterr().out
    assert "20.0 minutes" in told and "tok/s/GPU" in told and "1,557,611,200" in told


def test_4_train(course, capsys):
    train.main([*TINY, "--data", "clean/minhash/*.jsonl.gz", "--tokenizer", "tok", "--steps", "60",
                "--sample-tokens", "20", "--out", "base"])
    told = capsys.readouterr().out
    records = [json.loads(line) for line in Path("base/log.jsonl").read_text().splitlines()]
    first, last = records[0]["loss"], records[-1]["val_loss"]
    assert last < first - 1 and "done in" in told and Path("base/loss.png").exists()
    train.main([*TINY, "--data", "clean/minhash/*.jsonl.gz", "--tokenizer", "tok", "--steps", "60",
                "--profile", "--out", "profile"])
    assert "backward" in capsys.readouterr().out and Path("profile/trace-0.json").exists()


def test_5_several_processes(course):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", str(ROOT / "train.py"), *TINY, "--data", "clean/minhash/*.jsonl.gz",
               "--tokenizer", "tok", "--steps", "60", "--sample-tokens", "20", "--parallel", "fsdp",
               "--out", "two"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads(Path(f"{name}/log.jsonl").read_text().splitlines()[-1])["val_loss"]
                for name in ("base", "two"))
    assert two == pytest.approx(one, abs=0.02)


def test_6_evaluate(course, capsys):
    evaluate.main(["--model", "base", "--items", "20"])
    told = capsys.readouterr().out
    bits = float(told.split("bits per byte")[1].split()[0])
    val = [json.loads(line) for line in Path("base/log.jsonl").read_text().splitlines()]
    assert bits == pytest.approx(val[-1]["bits_per_byte"], rel=0.02)


def test_7_align_and_evaluate_again(course, capsys):
    align.main(["sft", "--model", "base", "--data", "crawl/chats.jsonl", "--steps", "4",
                "--batch-size", "16", "--out", "chat"])
    evaluate.main(["--model", "chat", "--items", "20"])
    assert "bits per byte" in capsys.readouterr().out
    assert Path("chat/model.safetensors").exists()


def test_8_chat(course):
    talk = subprocess.run([sys.executable, str(ROOT / "model.py"), "chat", "--model", "chat",
                           "--max-new-tokens", "5"], input="What is assert?\n", text=True,
                          capture_output=True, timeout=60)
    assert talk.returncode == 0 and "> " in talk.stdout, talk.stderr


ALONE = {  # script -> what it needs beside it, and its main function at work
    "filter_data": ((), "import filter_data as f; print(f.mask_emails('a@b.org'))", "EMAIL"),
    "tokenizer": ((), "import tokenizer as t; v, m = t.train_bpe(['abab abab'] * 9, 258); "
                  "print(t.Tokenizer(v, m).encode('abab'))", "[257"),
    "model": ((), "import model as m, torch; x = torch.zeros(1, 4, dtype=torch.long); print(m."
              "Transformer(m.ModelConfig(vocab_size=9, d_model=16, num_heads=2, num_layers=1))(x)"
              ".shape)", "[1, 4, 9]"),
    "kernels": ((), "import kernels as k, torch; q = torch.ones(1, 3, 2, 16); "
                "print(k.flash_attention(q, q, q).shape)", "[1, 3, 2, 16]"),
    "distributed": ((), "import distributed as d; d.main(['plan', '--gpus', '64'])", "tok/s/GPU"),
    "train": (("tokenizer", "model", "distributed"),
              "import train; print(train.cosine_schedule(0, 1.0, 0.1, 10, 20))", "0.0"),
    "scaling": ((), "import scaling, numpy as np; C = np.array([1e18, 1e19, 1e20]); "
                "print(scaling.fit_power_law(C, C ** 0.5))", "0.5"),
    "evaluate": (("tokenizer", "model"), "import evaluate as e; print(e.grade('1/2', '0.5'))",
                 "True"),
    "align": (("tokenizer", "model", "distributed", "train", "evaluate"),
              "import align as a, torch; print(a.masked_mean(torch.ones(2, 3), torch.ones(2, 3)))",
              "1."),
}


@pytest.mark.parametrize("script", ALONE)
def test_a_script_copied_alone_works(script, tmp_path):
    companions, code, expected = ALONE[script]
    for name in (script, *companions):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    for command in ([f"{script}.py", "--help"], ["-c", code]):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True,
                              cwd=tmp_path, timeout=60)
        assert done.returncode == 0, done.stderr[-2000:]
    assert expected in done.stdout
