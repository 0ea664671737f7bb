//! An `ovsdb-server` of the test's own, in a directory of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ovsdb_rs::{Client, ClientOptions, Endpoint};
use tempfile::TempDir;
use uuid::Uuid;

pub(crate) const DB: &str = "Lab";

ovsdb_rs::table! {
    /// Every kind of column.
    pub(crate) struct Thing in "Thing" {
        pub(crate) name: String,
        pub(crate) count: i64,
        pub(crate) ratio: f64,
        pub(crate) flag: bool,
        pub(crate) kind: Option<Kind>,
        pub(crate) note: Option<String>,
        pub(crate) limit: Option<u32>,
        pub(crate) token: Option<Uuid>,
        pub(crate) tags: BTreeSet<String>,
        pub(crate) numbers: Vec<i64>,
        pub(crate) ratios: Vec<f64>,
        pub(crate) pair: Vec<i64>,
        pub(crate) labels: BTreeMap<String, String>,
        pub(crate) weights: BTreeMap<i64, f64>,
        pub(crate) single: BTreeMap<String, String>,
        pub(crate) owner: Option<Uuid>,
        pub(crate) friends: BTreeSet<Uuid>,
        pub(crate) parts: BTreeSet<Uuid>,
    }

    #[derive(Eq)]
    pub(crate) struct Owner in "Owner" {
        pub(crate) name: String,
    }

    #[derive(Eq)]
    pub(crate) struct Part in "Part" {
        pub(crate) serial: i64,
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    Plain,
    Fancy,
}

/// A running server; killed when dropped.
pub(crate) struct Server {
    directory: TempDir,
    child: Option<Child>,
    /// A loopback address of this server's alone, so that no other takes its port between two runs.
    address: String,
    port: u16,
}

impl Server {
    /// A server of an empty standalone database.
    pub(crate) fn start() -> Self {
        Self::of_database(|directory| {
            run(Command::new(binary("ovsdb-tool"))
                .arg("create")
                .arg(directory.join("db"))
                .arg(schema()));
        })
    }

    /// A server that is a cluster of one: it keeps a history of transactions.
    pub(crate) fn start_clustered() -> Self {
        let server = Self::of_database(|directory| {
            run(Command::new(binary("ovsdb-tool"))
                .arg("create-cluster")
                .arg(directory.join("db"))
                .arg(schema())
                .arg(format!("unix:{}", directory.join("raft").display())));
        });
        run(Command::new(binary("ovsdb-client"))
            .arg("wait")
            .arg(server.unix().to_string())
            .args([DB, "connected"]));
        server
    }

    fn of_database(create: impl FnOnce(&Path)) -> Self {
        static NEXT_ADDRESS: AtomicU8 = AtomicU8::new(1);
        let directory = tempfile::tempdir().unwrap();
        create(directory.path());
        let [.., high, low] = std::process::id().to_be_bytes();
        let host = NEXT_ADDRESS.fetch_add(1, Ordering::Relaxed);
        let mut server = Self {
            directory,
            child: None,
            address: format!("127.{high}.{low}.{host}"),
            port: 0,
        };
        server.launch();
        server
    }

    /// Starts the server, on the port that it had before; returns once it listens.
    pub(crate) fn launch(&mut self) {
        let log = self.path("log");
        // Of an earlier run: its lines would be taken for this one's.
        let _ = std::fs::remove_file(&log);
        let child = Command::new(binary("ovsdb-server"))
            .args(["-vconsole:off", "-vfile:info"])
            .arg(self.path("db"))
            .arg(format!("--remote=punix:{}", self.path("sock").display()))
            .arg(format!("--remote=ptcp:{}:{}", self.port, self.address))
            // Remotes that a test configures, see the schema.
            .arg(format!("--remote=db:{DB},Root,remotes"))
            .arg(format!("--unixctl={}", self.path("ctl").display()))
            .arg(format!("--log-file={}", log.display()))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        self.child = Some(child);
        let deadline = Instant::now() + Duration::from_secs(20);
        let port = loop {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            let listening = text
                .lines()
                .find_map(|line| line.rsplit_once("listening on port "));
            // The socket too: the server binds its remotes in no particular order.
            if let (Some((_, port)), true) = (listening, self.path("sock").exists()) {
                break port.trim().parse().unwrap();
            }
            if self.port != 0 && std::net::TcpStream::connect((&*self.address, self.port)).is_ok() {
                break self.port;
            }
            let exited = self.child.as_mut().unwrap().try_wait().unwrap();
            assert!(exited.is_none(), "ovsdb-server: {exited:?}\n{text}");
            assert!(Instant::now() < deadline, "not listening:\n{text}");
            std::thread::sleep(Duration::from_millis(2));
        };
        self.port = port;
    }

    /// Ends the server without a chance to say goodbye.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Stops or continues the server's process.
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = self.child.as_ref().unwrap().id();
        kill(Pid::from_raw(pid.try_into().unwrap()), signal).unwrap();
    }

    pub(crate) fn unix(&self) -> Endpoint {
        Endpoint::Unix(self.path("sock"))
    }

    pub(crate) fn tcp(&self) -> Endpoint {
        format!("tcp:{}:{}", self.address, self.port)
            .parse()
            .unwrap()
    }

    /// The loopback address that no other server listens on.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Converts the database to another schema, online.
    pub(crate) fn convert(&self, schema: &Path) {
        run(Command::new(binary("ovsdb-client"))
            .arg("convert")
            .arg(self.unix().to_string())
            .arg(schema));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Options with which a failure shows within the test's patience.
pub(crate) fn options() -> ClientOptions {
    ClientOptions {
        min_backoff: Duration::from_millis(5),
        max_backoff: Duration::from_millis(50),
        ..ClientOptions::default()
    }
}

pub(crate) async fn connect(endpoint: Endpoint) -> Client {
    Client::connect(endpoint, options()).await.unwrap()
}

pub(crate) fn schema() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/server/lab.schema.json")
}

/// Panics when `future` takes longer than a test should.
pub(crate) async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(15), future)
        .await
        .expect("it takes too long")
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Where `make tools` puts Open vSwitch's programs.
fn cached() -> Option<PathBuf> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty());
    let cache = set("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(set("HOME")?).join(".cache")))?;
    Some(cache.join("segue/image-bin"))
}

/// Where a tool of Open vSwitch is: `SEGUE_OVS_BIN`, or else where `make tools` puts them, the path
/// and where Debian puts daemons.
fn binary(name: &str) -> PathBuf {
    let directories: Vec<PathBuf> = match env::var_os("SEGUE_OVS_BIN") {
        Some(directory) => vec![directory.into()],
        None => cached()
            .into_iter()
            .chain(env::split_paths(&env::var_os("PATH").unwrap_or_default()))
            .chain([PathBuf::from("/usr/sbin")])
            .collect(),
    };
    directories
        .iter()
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
        .unwrap_or_else(|| {
            panic!(
                "{name} is not in {directories:?}. These tests need a real server: \
                 `make tools`, `apt-get install openvswitch-switch`, or SEGUE_OVS_BIN set to \
                 the directory that has one"
            )
        })
}
