//! Documents agree with the code: what they name is there.

use prost_reflect::{DescriptorPool, DynamicMessage};
use service_kit::metrics::catalogue::ALL;
use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};
use tidy_tests::documents::{Document, documents};
use tidy_tests::packages::packages;
use tidy_tests::{files, read, report, root};

#[test]
fn the_code_map_has_a_paragraph_for_every_package_and_no_other() {
    let map = Document::read(Path::new("ARCHITECTURE.md"));
    let mut listed = BTreeSet::new();
    let mut problems = Vec::new();
    for line in &map.prose {
        if let Some((name, text)) = line.strip_prefix("**`").and_then(|rest| rest.split_once("`**")) {
            if !listed.insert(name.to_owned()) {
                problems.push(format!("`{name}` has two paragraphs"));
            }
            if text.len() < 60 {
                problems.push(format!("the paragraph of `{name}` says next to nothing"));
            }
        }
    }
    for package in packages() {
        if !listed.remove(&package.name) {
            problems.push(format!("`{}` ({}) has no paragraph", package.name, package.folder.display()));
        }
    }
    problems.extend(listed.iter().map(|name| format!("there is no package `{name}`")));
    report("the code map of ARCHITECTURE.md", &problems);
}

#[test]
fn relative_links_lead_somewhere() {
    let mut problems = Vec::new();
    for document in documents() {
        for link in document.links().filter(|link| !link.contains("://")) {
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { document.path.clone() } else { beside(&document.path, file) };
            let place = document.path.display();
            if !root().join(&target).exists() {
                problems.push(format!("{place}: `{link}`"));
            } else if !anchor.is_empty() && !Document::read(&target).anchors().any(|known| known == anchor) {
                problems.push(format!("{place}: `{link}` names no heading"));
            }
        }
    }
    report("links that lead nowhere", &problems);
}

/// `link` as seen from the folder of `document`, from the root.
fn beside(document: &Path, link: &str) -> PathBuf {
    let mut path = document.parent().unwrap_or(Path::new("")).to_owned();
    for part in Path::new(link).components() {
        match part {
            Component::ParentDir => {
                path.pop();
            }
            Component::Normal(name) => path.push(name),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    path
}

#[test]
fn named_files_are_there() {
    let folders = ["crates/", "services/", "tests/", "proto/", "docs/", "deploy/", "helm/", "scripts/"];
    let mut problems = Vec::new();
    for document in documents() {
        for span in document.code_spans() {
            let is_path =
                folders.iter().any(|folder| span.starts_with(folder)) && !span.contains([' ', '…', '<']);
            // Of `deploy/runs/*.yaml` or `gguf/{a,b}.rs` the folder must be there.
            let fixed = span.split(['*', '{']).next().unwrap_or_default();
            let fixed =
                if fixed == span { span } else { fixed.rsplit_once('/').map_or("", |(folder, _)| folder) };
            if is_path && !root().join(fixed).exists() {
                problems.push(format!("{}: `{span}`", document.path.display()));
            }
        }
    }
    report("files that documents name and that are not there", &problems);
}

#[test]
fn named_tests_are_there() {
    let sources: Vec<String> = files(".", &[".rs", ".py"]).iter().map(read).collect();
    let is_there = |name: &str| {
        sources
            .iter()
            .any(|text| text.contains(&format!("fn {name}(")) || text.contains(&format!("def {name}(")))
    };
    let mut problems = Vec::new();
    let mut found = 0;
    // The READMEs of suites name runs and fixtures in the same form.
    for document in documents().iter().filter(|document| !document.path.starts_with("tests")) {
        for span in document.code_spans() {
            let is_word = span.chars().all(|letter| matches!(letter, 'a'..='z' | '0'..='9' | '_'));
            let is_metric = ALL.iter().any(|metric| metric.prometheus_name() == span);
            // A name of five words or more is a test's sentence, or at least a function's.
            if is_word && span.matches('_').count() >= 4 && !is_metric {
                found += 1;
                if !is_there(span) {
                    problems.push(format!("{}: `{span}`", document.path.display()));
                }
            }
        }
    }
    report("tests that documents name and that are not there", &problems);
    assert!(found > 20, "docs/numerics.md names the tests that hold its formulas; found {found} names");
}

#[test]
fn make_targets_are_in_the_makefile() {
    let makefile = read("Makefile");
    let is_target = |name: &str| makefile.lines().any(|line| line.starts_with(&format!("{name}:")));
    let mut problems = Vec::new();
    for document in documents() {
        for command in document.all_commands().iter().filter(|command| command[0] == "make") {
            for target in command[1..].iter().filter(|word| !word.starts_with('-') && !word.contains('=')) {
                if !is_target(target) {
                    problems.push(format!("{}: `make {target}`", document.path.display()));
                }
            }
        }
    }
    report("targets that the Makefile does not have", &problems);
}

#[test]
fn commands_and_their_flags_are_in_the_command_lines() {
    let mut cli = sources_below("services/cli/src/args");
    cli.push_str(&read("services/cli/src/args.rs"));
    let kit = sources_below("crates/service-kit/src");
    let coordinator = read("services/coordinator/src/config.rs") + &kit;
    let worker = sources_below("services/worker/src") + &kit;
    let subcommands = variants(&read("services/cli/src/args.rs"), "enum Command {");
    let programs =
        [("espalier", flags(&cli)), ("coordinator", flags(&coordinator)), ("worker", flags(&worker))];
    for (program, flags) in &programs {
        assert!(flags.len() > 5, "the flags of `{program}` were read: {flags:?}");
    }
    let mut problems = Vec::new();
    let mut checked = 0;
    for document in documents() {
        for command in document.all_commands() {
            let name = command[0].rsplit('/').next().unwrap_or_default();
            let Some((program, flags)) = programs.iter().find(|(program, _)| *program == name) else {
                continue;
            };
            let place = format!("{}: `{}`", document.path.display(), command.join(" "));
            if *program == "espalier"
                && let Some(subcommand) = command.get(1)
                && !subcommand.starts_with('-')
                && !subcommands.contains(subcommand)
            {
                problems.push(format!("{place}: there is no command `{subcommand}`"));
            }
            for word in command.iter().filter_map(|word| word.strip_prefix("--")) {
                let flag = word.split('=').next().unwrap_or_default();
                checked += 1;
                if !flags.contains(flag) && !matches!(flag, "help" | "version") {
                    problems.push(format!("{place}: there is no flag `--{flag}`"));
                }
            }
        }
    }
    report("commands that are not there", &problems);
    assert!(checked > 20, "the documents show how the programs are called; found {checked} flags");
}

fn sources_below(folder: &str) -> String {
    files(folder, &[".rs"]).iter().map(read).collect()
}

/// The long flags of clap's structs: named, or else the field below the attribute.
fn flags(source: &str) -> BTreeSet<String> {
    let mut flags = BTreeSet::new();
    for attribute in source.split("#[arg(").skip(1) {
        let Some((arguments, rest)) = attribute.split_once(")]") else { continue };
        let mut words = arguments.split(',').map(str::trim);
        if let Some(named) = words.clone().find_map(|word| word.strip_prefix("long = \"")) {
            flags.insert(named.trim_end_matches('"').to_owned());
        } else if words.any(|word| word == "long")
            && let Some((field, _)) = rest.split_once(':')
            && let Some(name) = field.split_whitespace().last()
        {
            flags.insert(name.replace('_', "-"));
        }
    }
    flags
}

/// The variants of an enum, as clap names its commands.
fn variants(source: &str, head: &str) -> BTreeSet<String> {
    let body = source.split_once(head).expect("the enum is there").1.split("\n}").next().unwrap_or_default();
    let names = body.lines().map(str::trim).filter(|line| line.starts_with(char::is_uppercase));
    names.map(|line| line.split(['(', ',', ' ']).next().unwrap_or_default().to_lowercase()).collect()
}

#[test]
fn grpcurl_lines_name_what_is_served_and_send_what_it_takes() {
    let schema = DescriptorPool::decode(wire::pb::DESCRIPTORS).expect("the schema decodes");
    let mut problems = Vec::new();
    let mut checked = 0;
    for document in documents() {
        let commands = document.all_commands();
        for command in commands.iter().filter(|command| command[0] == "grpcurl" && command.len() > 1) {
            checked += 1;
            if let Err(problem) = check_grpcurl(&schema, &command[1..]) {
                problems.push(format!("{}: `{}`: {problem}", document.path.display(), command.join(" ")));
            }
        }
    }
    report("grpcurl lines", &problems);
    assert!(checked >= 4, "the README shows list, describe and calls; found {checked} lines");
}

fn check_grpcurl(schema: &DescriptorPool, words: &[String]) -> Result<(), String> {
    let (mut data, mut operands) = ("{}", Vec::new());
    let mut words = words.iter().map(String::as_str);
    while let Some(word) = words.next() {
        match word {
            "-d" => data = words.next().unwrap_or_default(),
            "-plaintext" => {}
            _ if word.starts_with('-') => return Err(format!("`{word}` is not known to this check")),
            _ => operands.push(word),
        }
    }
    match operands.as_slice() {
        [_address, "list"] => Ok(()),
        [_address, "list" | "describe", symbol] => {
            let known = schema.get_service_by_name(symbol).is_some()
                || schema.get_message_by_name(symbol).is_some()
                || schema.get_enum_by_name(symbol).is_some();
            if known { Ok(()) } else { Err(format!("the schema has no `{symbol}`")) }
        }
        // Served by every process, described elsewhere.
        [_address, "grpc.health.v1.Health/Check" | "grpc.health.v1.Health/Watch"] => Ok(()),
        [_address, method] => {
            let (service, name) = method.split_once('/').ok_or("neither a method nor a command")?;
            let service =
                schema.get_service_by_name(service).ok_or(format!("there is no service `{service}`"))?;
            let method = service.methods().find(|method| method.name() == name);
            let input = method.ok_or(format!("there is no method `{name}`"))?.input();
            let mut json = serde_json::Deserializer::from_str(data);
            DynamicMessage::deserialize(input, &mut json).map_err(|error| error.to_string())?;
            json.end().map_err(|error| error.to_string())
        }
        _ => Err("neither list, describe nor a call".to_owned()),
    }
}
