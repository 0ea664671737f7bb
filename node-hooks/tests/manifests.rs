//! What an operator applies is what the program takes.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests assert by panicking, as tests do"
)]

use std::fs;
use std::path::Path;

use clap::Parser;
use node_hooks::Cli;
use serde_json::Value;

fn manifest(name: &str) -> Value {
    let manifests = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests");
    let text = fs::read_to_string(manifests.join(name)).unwrap();
    serde_saphyr::from_str(&text).unwrap()
}

fn texts(value: &Value) -> Vec<&str> {
    let values = value.as_array().unwrap().iter();
    values.map(|value| value.as_str().unwrap()).collect()
}

fn container() -> Value {
    let daemon_set = manifest("agent/daemonset.yaml");
    daemon_set["spec"]["template"]["spec"]["containers"][0].clone()
}

#[test]
fn the_arguments_are_taken_and_name_what_is_mounted() {
    let container = container();
    let args = texts(&container["args"]);
    let given = [&["node-hooks", "--node=node1"][..], &args].concat();
    Cli::try_parse_from(given).unwrap();
    let mounts = container["volumeMounts"].as_array().unwrap();
    let mounted: Vec<&str> = mounts
        .iter()
        .map(|mount| mount["mountPath"].as_str().unwrap())
        .collect();
    for arg in args {
        if let Some((name, path)) = arg.split_once("=/") {
            let path = format!("/{path}");
            let below = |mount: &&str| path.starts_with(*mount);
            assert!(mounted.iter().any(below), "{name}: {path} is not mounted");
        }
    }
}

#[test]
fn it_asks_for_no_more_than_it_needs() {
    let capabilities = &container()["securityContext"]["capabilities"];
    assert_eq!(texts(&capabilities["drop"]), ["ALL"]);
    assert_eq!(texts(&capabilities["add"]), ["NET_RAW", "DAC_OVERRIDE"]);
    let account = manifest("agent/service-account.yaml");
    assert_eq!(account["automountServiceAccountToken"], false);
}

#[test]
fn the_plugin_names_the_agents_socket_and_waits_for_it() {
    let plugin = manifest("agent/plugin/plugin.yaml");
    let hook = &plugin["spec"]["nodeHooks"][0];
    let socket = format!("--hook-socket={}", hook["socket"].as_str().unwrap());
    let container = container();
    assert!(texts(&container["args"]).contains(&socket.as_str()));
    let timeout = hook["timeout"].as_str().unwrap().strip_suffix('s').unwrap();
    let timeout: u64 = timeout.parse().unwrap();
    // The agent's own deadline, unless it is told another.
    assert!(timeout > 20);
}
