//! A real `ovsdb-server` with one of OVN's schemas, for tests.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ovsdb_rs::{Client, ClientOptions, Endpoint};
use tempfile::TempDir;

/// A running server; killed when dropped.
pub(crate) struct Server {
    directory: TempDir,
    child: Child,
}

impl Server {
    /// A server of an empty database with the schema `<name>.ovsschema`.
    pub(crate) fn start(schema: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let database = directory.path().join("db");
        let created = Command::new(program("ovsdb-tool"))
            .arg("create")
            .arg(&database)
            .arg(schema_file(schema))
            .status()
            .unwrap();
        assert!(created.success(), "ovsdb-tool: {created}");
        let child = Command::new(program("ovsdb-server"))
            .args(["-vconsole:off", "-vfile:off", "--no-chdir"])
            .arg(format!(
                "--remote=punix:{}",
                directory.path().join("sock").display()
            ))
            .arg(format!(
                "--unixctl={}",
                directory.path().join("ctl").display()
            ))
            .arg(database)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self { directory, child }
    }

    /// A client of it; waits until the server listens.
    pub(crate) async fn connect(&self) -> Client {
        let options = ClientOptions {
            min_backoff: Duration::from_millis(5),
            max_backoff: Duration::from_millis(50),
            ..ClientOptions::default()
        };
        let socket = Endpoint::Unix(self.directory.path().join("sock"));
        soon(Client::connect(socket, options)).await.unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail only where it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Panics when `future` takes longer than a test should.
pub(crate) async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future)
        .await
        .expect("it takes too long")
}

fn program(name: &str) -> PathBuf {
    let path = env::var_os("PATH").unwrap_or_default();
    let directories: Vec<_> = match env::var_os("SEGUE_OVS_BIN") {
        Some(directory) => vec![directory.into()],
        None => cached()
            .into_iter()
            .chain(env::split_paths(&path))
            .chain([PathBuf::from("/usr/sbin")])
            .collect(),
    };
    let remedy = "run `make tools`, install openvswitch-switch, or set SEGUE_OVS_BIN";
    find(&directories, name, remedy)
}

fn schema_file(name: &str) -> PathBuf {
    let directories: Vec<_> = match env::var_os("SEGUE_OVN_SCHEMAS") {
        Some(directory) => vec![directory.into()],
        None => cached()
            .map(|cached| cached.join("schemas"))
            .into_iter()
            .chain([PathBuf::from("/usr/share/ovn")])
            .collect(),
    };
    let remedy = "run `make tools`, install ovn-common, or set SEGUE_OVN_SCHEMAS";
    find(&directories, &format!("{name}.ovsschema"), remedy)
}

/// Where `make tools` puts Open vSwitch's programs.
fn cached() -> Option<PathBuf> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty());
    let cache = set("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(set("HOME")?).join(".cache")))?;
    Some(cache.join("segue/image-bin"))
}

fn find(directories: &[PathBuf], name: &str, remedy: &str) -> PathBuf {
    directories
        .iter()
        .map(|directory: &PathBuf| Path::join(directory, name))
        .find(|path| path.is_file())
        .unwrap_or_else(|| panic!("{name} is not in {directories:?}: {remedy}"))
}
