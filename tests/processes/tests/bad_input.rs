//! Wrong input, at the command line: each case ends soon, with the right exit code and words that help, and leaves
//! nothing running.

use processes_tests::{
    Tool, broken_model, copy_model, damaged, fixture, free_port, parquet_file, with_config,
};
use serde_json::json;
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(20);
const FAILED: i32 = 1;
const WRONG: i32 = 2;

struct Case {
    name: &'static str,
    tool: Tool,
    code: i32,
    words: &'static [&'static str],
}

fn case(name: &'static str, tool: Tool, code: i32, words: &'static [&'static str]) -> Case {
    Case { name, tool, code, words }
}

/// Runs the cases, two at a time, and tells of all that went wrong.
fn judge(cases: Vec<Case>) {
    let cases = Mutex::new(cases.into_iter());
    let complaints = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let Some(Case { name, tool, code, words }) = cases.lock().unwrap().next() else { return };
                    let found = tool.run(DEADLINE).complaints(code, words);
                    if !found.is_empty() {
                        complaints.lock().unwrap().push(format!("{name}: {}", found.join("; ")));
                    }
                }
            });
        }
    });
    let complaints = complaints.into_inner().unwrap();
    assert!(complaints.is_empty(), "{} cases went wrong\n\n{}", complaints.len(), complaints.join("\n\n"));
}

/// `prune` of a tiny model, short enough to end in seconds if the input were right.
fn prune(scratch: &Path, out: &str) -> Tool {
    prune_model(&fixture("models/gqa"), scratch, out)
}

fn prune_model(model: &Path, scratch: &Path, out: &str) -> Tool {
    bare_prune(model, scratch, out).flag("--data", fixture("text/tiny.txt"))
}

fn bare_prune(model: &Path, scratch: &Path, out: &str) -> Tool {
    Tool::espalier("prune --window-tokens 16 --rows 2 --threads 1")
        .flag("--model", model)
        .flag("--out", scratch.join(out))
}

fn prune_text(scratch: &Path, out: &str, text: &Path) -> Tool {
    bare_prune(&fixture("models/gqa"), scratch, out).flag("--steps", "5").flag("--data", text)
}

#[test]
fn a_wrong_command_line_is_refused_with_words_that_help() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let full = dir.join("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("thesis.txt"), "x").unwrap();
    fs::write(dir.join("file"), "x").unwrap();
    let yaml = |name: &str, text: &str| {
        let path = dir.join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let unknown_key = yaml("unknown.yaml", "steps: 3\npruning: {colour: red}\n");
    let broken = yaml("broken.yaml", "steps: [1\n");
    let wrong_kind = yaml("kind.yaml", "recipe: {optimizer: {kind: lion}}\n");
    let wrong_type = yaml("type.yaml", "recipe: {steps: many}\n");
    let prune = |out: &str| prune(dir, out);
    let with = |out: &str, words: &str| prune(out).args(words.split_whitespace());
    judge(vec![
        case("no command", Tool::espalier(""), WRONG, &["Usage", "prune"]),
        case("unknown command", Tool::espalier("grow"), WRONG, &["grow"]),
        case("unknown flag", with("a1", "--colour red"), WRONG, &["--colour"]),
        case(
            "unknown criterion",
            with("a2", "--criterion best"),
            WRONG,
            &["best", "loraprune-code", "taylor"],
        ),
        case("unknown shape", with("a3", "--shape round"), WRONG, &["round", "uniform"]),
        case("unknown grouping", with("a4", "--head-grouping pairs"), WRONG, &["pairs", "kv-groups"]),
        case("unknown export dtype", with("a5", "--export-dtype int3"), WRONG, &["int3", "bf16"]),
        case("unknown compute format", with("a6", "--compute f8"), WRONG, &["f8", "f32"]),
        case("no workers", with("a7", "--workers 0"), WRONG, &["--workers", "0"]),
        case("workers in words", with("a8", "--workers two"), WRONG, &["two"]),
        case("more workers than kv heads", with("a9", "--workers 4"), WRONG, &["tp_degree", "4", "3"]),
        case("sparsity of one", with("b1", "--sparsity 1"), WRONG, &["pruning.budget.sparsity", "[0, 1)"]),
        case("negative sparsity", with("b2", "--sparsity -0.1"), WRONG, &["pruning.budget.sparsity", "-0.1"]),
        case(
            "sparsity not a number",
            with("b3", "--sparsity nan"),
            WRONG,
            &["pruning.budget.sparsity", "NaN"],
        ),
        case(
            "two budgets",
            with("b4", "--sparsity 0.5 --parameters 9"),
            WRONG,
            &["--parameters", "--sparsity"],
        ),
        case("a budget below the embeddings", with("b5", "--parameters 9"), WRONG, &["parameters", "9"]),
        case("no rows", prune("b6").args(["--rows=0"]).args(["--micro-batches", "0"]), WRONG, &["rows"]),
        case("a dropout of one", with("b7", "--dropout 1"), WRONG, &["lora.dropout", "[0, 1)"]),
        case("no LoRA rank", with("b8", "--lora-rank 0"), WRONG, &["lora.rank", "1..=1024"]),
        case(
            "a negative learning rate",
            with("b9", "--learning-rate -1"),
            WRONG,
            &["learning_rate.peak", "-1"],
        ),
        case("no cool-down", with("c1", "--cooldown 0"), WRONG, &["pruning.ramp", "cooldown"]),
        case("no steps between decisions", with("c2", "--every 0"), WRONG, &["pruning.ramp.every"]),
        case(
            "protected layers of a uniform shape",
            with("c3", "--protect 0"),
            WRONG,
            &["pruning.protection", "paper"],
        ),
        case("a layer that is not there", with("c4", "--shape paper --protect 99"), WRONG, &["99"]),
        case("a full output folder", prune("full"), WRONG, &["full", "not empty"]),
        case("an output folder inside a file", prune("file/out"), WRONG, &["file/out"]),
        case("an output folder that is a file", prune("file"), WRONG, &["file"]),
        case("no model", Tool::espalier("prune --data x --out y"), WRONG, &["--model"]),
        case("no text", Tool::espalier("prune --model x --out y"), WRONG, &["--data"]),
        case(
            "a window for an evaluation without text",
            with("c5", "--eval-window 8"),
            WRONG,
            &["--eval-window", "--eval-data"],
        ),
        case("no recipe file", prune("c6").flag("--recipe", dir.join("none.yaml")), WRONG, &["none.yaml"]),
        case(
            "an unknown key",
            prune("c7").flag("--recipe", unknown_key),
            WRONG,
            &["unknown.yaml", "pruning", "colour"],
        ),
        case("broken YAML", prune("c8").flag("--recipe", broken), WRONG, &["broken.yaml", "YAML", "line"]),
        case("an unknown optimizer", prune("c9").flag("--recipe", wrong_kind), WRONG, &["lion", "adamw"]),
        case(
            "a word for a number",
            prune("d1").flag("--recipe", wrong_type),
            WRONG,
            &["recipe.steps", "many"],
        ),
        case(
            "no worker binary",
            prune("d2").env("ESPALIER_WORKER_BIN", "/nowhere/worker"),
            WRONG,
            &["ESPALIER_WORKER_BIN", "/nowhere/worker"],
        ),
        case(
            "a worker that ends at once",
            prune("d3").env("ESPALIER_WORKER_BIN", "/bin/false"),
            FAILED,
            &["worker-0", "ended unexpectedly"],
        ),
        case("directives that mean nothing", prune("d4").env("RUST_LOG", "worker=loud"), WRONG, &["loud"]),
    ]);
}

#[test]
fn a_broken_model_is_named_with_file_and_fault() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let empty = dir.join("empty");
    fs::create_dir(&empty).unwrap();
    let config = |name: &str, change: fn(&mut serde_json::Value)| with_config("mha", &dir.join(name), change);
    let weights = |name: &str, change: fn(Vec<u8>) -> Vec<u8>| {
        damaged("mha", &dir.join(name), "model.safetensors", change)
    };
    let cases = [
        ("no folder", dir.join("none"), WRONG, &["none", "No such file"][..]),
        ("a file", fixture("text/tiny.txt"), WRONG, &["tiny.txt", "folder"]),
        ("an empty folder", empty, WRONG, &["config.json"]),
        (
            "broken config",
            damaged("mha", &dir.join("m1"), "config.json", |bytes| bytes[..40].to_vec()),
            WRONG,
            &["config.json", "JSON", "line"],
        ),
        (
            "an unknown architecture",
            config("m2", |c| c["model_type"] = json!("gpt2")),
            WRONG,
            &["model_type", "gpt2"],
        ),
        ("biases", config("m3", |c| c["attention_bias"] = json!(true)), WRONG, &["attention_bias"]),
        (
            "heads that do not divide",
            config("m4", |c| c["num_key_value_heads"] = json!(3)),
            WRONG,
            &["config.json", "3", "4"],
        ),
        ("no layers", config("m5", |c| c["num_hidden_layers"] = json!(0)), WRONG, &["num_hidden_layers"]),
        (
            "a width in words",
            config("m6", |c| c["hidden_size"] = json!("wide")),
            WRONG,
            &["hidden_size", "wide"],
        ),
        (
            "a width beyond reason",
            config("m7", |c| c["hidden_size"] = json!(1_u64 << 60)),
            WRONG,
            &["hidden_size"],
        ),
        (
            "shapes other than the config's",
            config("m8", |c| c["intermediate_size"] = json!(64)),
            WRONG,
            &["down_proj", "[32, 48]", "[32, 64]"],
        ),
        (
            "more layers than weights",
            config("m9", |c| c["num_hidden_layers"] = json!(5)),
            WRONG,
            &["layers.4", "model.safetensors"],
        ),
        (
            "no weights",
            broken_model("mha", &dir.join("n1"), "model.safetensors"),
            WRONG,
            &["model.safetensors"],
        ),
        (
            "a missing shard",
            broken_model("bf16_sharded", &dir.join("n2"), "model-00002-of-00003.safetensors"),
            WRONG,
            &["model-00002-of-00003.safetensors"],
        ),
        (
            "truncated weights",
            weights("n3", |bytes| bytes[..bytes.len() / 2].to_vec()),
            WRONG,
            &["model.safetensors"],
        ),
        (
            "weights cut in the header",
            weights("n4", |bytes| bytes[..100].to_vec()),
            WRONG,
            &["model.safetensors"],
        ),
        ("empty weights", weights("n5", |_| Vec::new()), WRONG, &["model.safetensors"]),
        (
            "a header longer than the file",
            weights("n6", |mut bytes| {
                bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
                bytes
            }),
            WRONG,
            &["model.safetensors", "header"],
        ),
        (
            "a header that is no JSON",
            weights("n7", |mut bytes| {
                bytes[8] = b'?';
                bytes
            }),
            WRONG,
            &["model.safetensors", "header"],
        ),
        (
            "NaN among the weights",
            weights("n8", |mut bytes| {
                // Somewhere in the middle of the data, which are f32.
                let place = bytes.len() - 4 * 1000;
                bytes[place..place + 4].copy_from_slice(&f32::NAN.to_le_bytes());
                bytes
            }),
            FAILED,
            &["NaN", "proj"],
        ),
        ("no tokenizer", broken_model("mha", &dir.join("n9"), "tokenizer.json"), FAILED, &["tokenizer.json"]),
        (
            "a broken tokenizer",
            damaged("mha", &dir.join("o1"), "tokenizer.json", |bytes| bytes[..50].to_vec()),
            FAILED,
            &["tokenizer"],
        ),
    ];
    let out = |index: usize| format!("out{index}");
    judge(
        cases
            .into_iter()
            .enumerate()
            .map(|(index, (name, model, code, words))| {
                case(name, prune_model(&model, dir, &out(index)).flag("--steps", "5"), code, words)
            })
            .collect(),
    );
}

#[test]
fn a_broken_text_is_named_with_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let text = |name: &str, bytes: &[u8]| {
        let path = dir.join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let line = "{\"text\": \"a line that is long enough to fill a window of sixteen tokens\"}\n";
    let numbers = dir.join("numbers.parquet");
    parquet_file(&numbers);
    let cases = [
        ("no file", dir.join("none.txt"), WRONG, &["none.txt"][..]),
        ("a folder", dir.to_owned(), WRONG, &["not a file"]),
        ("an empty file", text("empty.txt", b""), WRONG, &["empty.txt", "is empty"]),
        ("an unknown extension", text("a.docx", b"words words words words"), FAILED, &["a.docx", ".jsonl"]),
        (
            "not UTF-8",
            text("latin.txt", b"na\xefve words, and many more of them"),
            FAILED,
            &["latin.txt", "UTF-8"],
        ),
        ("shorter than a window", text("short.txt", b"short"), FAILED, &["5 tokens", "16"]),
        (
            "a broken line",
            text("broken.jsonl", format!("{line}{{\"text\": \n{line}").as_bytes()),
            FAILED,
            &["broken.jsonl", "line 2", "JSON"],
        ),
        (
            "a line without the field",
            text("field.jsonl", format!("{line}{{\"body\": \"x\"}}\n").as_bytes()),
            FAILED,
            &["field.jsonl", "line 2", "`text`", "body"],
        ),
        (
            "a number for a text",
            text("number.jsonl", b"{\"text\": 7}\n"),
            FAILED,
            &["number.jsonl", "line 1", "text"],
        ),
        ("a column that is not there", numbers, FAILED, &["numbers.parquet", "`text`", "number"]),
        ("no Parquet", text("no.parquet", b"PAR1 but nothing else, really"), FAILED, &["no.parquet"]),
        ("half a token", text("half.u16", &[1, 0, 2]), FAILED, &["half.u16", "3 bytes"]),
        ("a token beyond the vocabulary", text("big.u16", &[0xff; 256]), FAILED, &["big.u16", "65535", "96"]),
    ];
    let mut judged: Vec<Case> = cases
        .into_iter()
        .enumerate()
        .map(|(index, (name, path, code, words))| {
            case(name, prune_text(dir, &format!("out{index}"), &path), code, words)
        })
        .collect();
    let eval = |window: &str| {
        Tool::espalier("eval --threads 1")
            .flag("--model", fixture("models/mha"))
            .flag("--data", fixture("text/held_out.txt"))
            .flag("--window", window)
    };
    judged.push(case("a window longer than the text", eval("100000"), FAILED, &["100000"]));
    judged.push(case("a window of one token", eval("1"), WRONG, &["window_tokens", "2"]));
    judge(judged);
}

#[test]
fn files_of_other_commands_are_judged_too() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let import =
        |gguf: &Path| Tool::espalier("import").flag("--gguf", gguf).flag("--out", dir.join("imported"));
    let magic = file("magic.gguf", b"GGML\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    let truncated =
        file("cut.gguf", b"GGUF\x03\0\0\0\x05\0\0\0\0\0\0\0\x09\0\0\0\0\0\0\0\x40\0\0\0\0\0\0\0gen");
    let lying = file("lying.gguf", b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\x7f\x01\0\0\0\0\0\0\0");
    let version = file("old.gguf", b"GGUF\x63\0\0\0\x05\0\0\0\0\0\0\0\x09\0\0\0\0\0\0\0");
    let full = copy_model("mha", &dir.join("full"));
    let logits = |tokens: &str, out: &str| {
        Tool::espalier("logits")
            .flag("--model", fixture("models/mha"))
            .flag("--tokens", tokens)
            .flag("--out", dir.join(out))
    };
    let report =
        |events: &Path| Tool::espalier("report").flag("--events", events).flag("--out", dir.join("r.html"));
    judge(vec![
        case("no GGUF", import(&dir.join("none.gguf")), WRONG, &["none.gguf"]),
        case("another magic", import(&magic), WRONG, &["magic.gguf", "GGUF"]),
        case("a truncated GGUF", import(&truncated), WRONG, &["cut.gguf"]),
        case("a GGUF that lies about its size", import(&lying), WRONG, &["lying.gguf"]),
        case("a GGUF of another version", import(&version), WRONG, &["old.gguf", "99"]),
        case("an empty GGUF", import(&file("empty.gguf", b"")), WRONG, &["empty.gguf"]),
        case(
            "import over a model",
            Tool::espalier("import").flag("--gguf", &magic).flag("--out", &full),
            WRONG,
            &["magic.gguf"],
        ),
        case("a token beyond the vocabulary", logits("1,96", "l1"), WRONG, &["96", "vocabulary"]),
        case("a word for a token", logits("1,two", "l2"), WRONG, &["two"]),
        case("logits into no folder", logits("1,2", "none/l3"), FAILED, &["none/l3"]),
        case("no events", report(&dir.join("none.jsonl")), WRONG, &["none.jsonl"]),
        case("empty events", report(&file("empty.jsonl", b"\n")), WRONG, &["empty.jsonl", "no events"]),
        case(
            "broken events",
            report(&file("broken.jsonl", b"{\n")),
            WRONG,
            &["broken.jsonl", "line 1", "JSON"],
        ),
        case(
            "other events",
            report(&file("other.jsonl", b"{\"colour\": 1}\n")),
            WRONG,
            &["other.jsonl", "colour"],
        ),
    ]);
}

#[test]
fn services_that_cannot_serve_say_why() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken_address = taken.local_addr().unwrap().to_string();
    let nobody = format!("http://127.0.0.1:{}", free_port());
    let coordinator = |listen: &str| {
        Tool::new("coordinator")
            .flag("--listen", listen)
            .flag("--root", dir)
            .flag("--data-dir", dir.join("state"))
    };
    let bare_worker =
        |listen: &str, root: &Path| Tool::new("worker").flag("--listen", listen).flag("--root", root);
    let worker = |root: &Path| bare_worker("127.0.0.1:0", root).flag("--coordinator", &nobody);
    judge(vec![
        case("a port in use", coordinator(&taken_address), FAILED, &["in use", "--listen"]),
        case("an open address", coordinator("0.0.0.0:0"), FAILED, &["0.0.0.0", "--insecure"]),
        case("an address that is none", coordinator("here"), WRONG, &["here"]),
        case(
            "a root that is not there",
            Tool::new("coordinator")
                .flag("--listen", "127.0.0.1:0")
                .flag("--root", dir.join("none"))
                .flag("--data-dir", dir.join("state")),
            FAILED,
            &["none"],
        ),
        case(
            "no root",
            Tool::new("coordinator").flag("--listen", "127.0.0.1:0").flag("--data-dir", dir.join("state")),
            FAILED,
            &["--root"],
        ),
        case(
            "a worker without its coordinator",
            worker(dir).flag("--register-timeout-seconds", "2"),
            FAILED,
            &["register", "http://127.0.0.1:"],
        ),
        case(
            "a worker's port in use",
            bare_worker(&taken_address, dir).flag("--coordinator", &nobody),
            FAILED,
            &["in use"],
        ),
        case(
            "a worker that is told of no coordinator",
            bare_worker("127.0.0.1:0", dir),
            FAILED,
            &["--coordinator"],
        ),
        case("a worker's root", worker(&dir.join("none")), FAILED, &["none"]),
        case("a device that is none", worker(dir).flag("--device", "abacus"), FAILED, &["abacus"]),
        case(
            "nobody there",
            Tool::espalier("list").flag("--coordinator", &nobody),
            FAILED,
            &["failed to connect"],
        ),
        case("a URL that is none", Tool::espalier("list --coordinator here"), WRONG, &["here", "URL"]),
        case(
            "a URL of another kind",
            Tool::espalier("workers --coordinator ftp://127.0.0.1"),
            WRONG,
            &["ftp://127.0.0.1", "URL"],
        ),
    ]);
}

#[test]
fn a_wrong_task_file_is_named_with_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let good = r#"{"query": "a", "choices": ["b", "c"], "gold": 0}"#;
    let task = |name: &str, row: &str| {
        let path = folder.path().join(format!("{name}.jsonl"));
        fs::write(&path, format!("{good}\n{row}\n")).unwrap();
        path
    };
    let eval = |path: &Path| {
        Tool::espalier("eval --threads 1")
            .flag("--model", fixture("models/stories260k"))
            .flag("--tasks", path)
    };
    let empty = folder.path().join("empty.jsonl");
    fs::write(&empty, "").unwrap();
    judge(vec![
        case(
            "no right answer",
            eval(&task("goldless", r#"{"query": "a", "choices": ["b", "c"]}"#)),
            FAILED,
            &["goldless.jsonl` line 2", "no field `gold`"],
        ),
        case(
            "a right answer that is not there",
            eval(&task("far", r#"{"query": "a", "choices": ["b", "c"], "gold": 2}"#)),
            FAILED,
            &["far.jsonl` line 2", "`gold` is 2", "0..2"],
        ),
        case(
            "no choices",
            eval(&task("bare", r#"{"query": "a", "choices": [], "gold": 0}"#)),
            FAILED,
            &["bare.jsonl` line 2", "`choices`", "at least 2"],
        ),
        case(
            "no JSON",
            eval(&task("prose", "Once upon a time")),
            FAILED,
            &["prose.jsonl` line 2", "not JSON"],
        ),
        case(
            "a choice longer than the model's window",
            eval(&task(
                "long",
                &format!(r#"{{"query": "a", "choices": ["b", "{}"], "gold": 0}}"#, "dog ".repeat(600)),
            )),
            FAILED,
            &["long.jsonl` line 2", "512 positions"],
        ),
        case("an empty file", eval(&empty), WRONG, &["empty.jsonl", "is empty"]),
        case("no file", eval(&folder.path().join("none.jsonl")), WRONG, &["none.jsonl"]),
        case(
            "neither text nor task",
            Tool::espalier("eval").flag("--model", fixture("models/stories260k")),
            WRONG,
            &["--data"],
        ),
        case(
            "log-likelihoods in a table",
            eval(&task("fine", good)).args(["--log-likelihoods"]),
            WRONG,
            &["--json"],
        ),
    ]);
}
