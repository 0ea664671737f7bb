//! Interfaces chosen by the logical port that Open vSwitch has them for.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{Lab, until};

/// An `ovsdb-server` with as much of Open vSwitch's schema as matters; ended when dropped.
struct Database {
    directory: TempDir,
    child: Option<Child>,
}

impl Database {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let schema = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/vswitch.schema.json");
        let created = Command::new(tools().join("ovsdb-tool"))
            .arg("create")
            .arg(directory.path().join("db"))
            .arg(schema)
            .status()
            .unwrap();
        assert!(created.success(), "ovsdb-tool");
        Self {
            directory,
            child: None,
        }
    }

    fn start(&mut self) {
        let child = Command::new(tools().join("ovsdb-server"))
            .args(["-vconsole:off", "-vfile:off"])
            .arg(self.directory.path().join("db"))
            .arg(format!("--remote=punix:{}", self.socket().display()))
            .arg("--unixctl")
            .arg(self.directory.path().join("ctl"))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        self.child = Some(child);
        until("the database listens", || self.socket().exists());
    }

    fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = std::fs::remove_file(self.socket());
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("sock")
    }

    /// Has the switch have these interfaces for these ports, and no others.
    fn set(&self, interfaces: &[(&str, &str)]) {
        let mut operations = vec![
            json!("Open_vSwitch"),
            json!({"op": "delete", "table": "Interface", "where": []}),
        ];
        operations.extend(interfaces.iter().map(|(name, id)| {
            let row = json!({"name": name, "external_ids": ["map", [["iface-id", id]]]});
            json!({"op": "insert", "table": "Interface", "row": row})
        }));
        let output = Command::new(tools().join("ovsdb-client"))
            .arg("transact")
            .arg(format!("unix:{}", self.socket().display()))
            .arg(Value::from(operations).to_string())
            .output()
            .unwrap();
        let reply = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success() && !reply.contains("error"),
            "{reply}"
        );
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Where `make tools` puts Open vSwitch's programs, or `SEGUE_OVS_BIN`.
fn tools() -> PathBuf {
    let cache = || {
        let home = env::var("HOME").unwrap_or_default();
        let cache = env::var("XDG_CACHE_HOME").unwrap_or_else(|_| format!("{home}/.cache"));
        Path::new(&cache).join("segue/image-bin")
    };
    env::var("SEGUE_OVS_BIN").map_or_else(|_| cache(), PathBuf::from)
}

#[test]
#[ignore = "needs root and Open vSwitch's programs: cargo test -p arp-proxy --test e2e -- --ignored"]
fn the_interfaces_of_a_logical_port_are_watched() {
    let lab = Lab::linked();
    lab.route("eth0");
    let mut database = Database::new();
    let socket = database.socket();
    database.start();
    database.set(&[("tap0", "default_vm-1"), ("eth7", "default_vm-7")]);
    let proxy = lab.start(
        &["--iface-id=*_vm-*", "--ovsdb", socket.to_str().unwrap()],
        &["tap0"],
    );
    lab.resolve("eth0");
    database.set(&[("tap0", "other")]);
    proxy.watches(&[]);
    database.set(&[("tap0", "default_vm-2")]);
    proxy.watches(&["tap0"]);
}

#[test]
#[ignore = "needs root and Open vSwitch's programs: cargo test -p arp-proxy --test e2e -- --ignored"]
fn a_database_that_goes_away_changes_nothing_until_it_is_back() {
    let lab = Lab::linked();
    lab.route("eth0");
    let mut database = Database::new();
    let socket = database.socket();
    database.start();
    database.set(&[("tap0", "vm-1")]);
    let arguments = ["--iface-id=vm-*", "--ovsdb", socket.to_str().unwrap()];
    let proxy = lab.start(&arguments, &["tap0"]);
    database.stop();
    lab.resolve("eth0");
    proxy.watches(&["tap0"]);
    database.start();
    database.set(&[]);
    proxy.watches(&[]);
}
