//! An Open vSwitch of the test's own, in a directory of its own.

use std::env;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(30);
/// Bridges are restricted to one.
const ALL_VERSIONS: &str = "-OOpenFlow10,OpenFlow11,OpenFlow12,OpenFlow13,OpenFlow14,OpenFlow15";

/// A database, and a switch once it is started; killed when dropped.
pub(crate) struct Ovs {
    directory: TempDir,
    database: Child,
    switch: Option<Child>,
}

impl Ovs {
    /// A database without a switch: what is written is not acted upon.
    pub(crate) fn database() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("conf.db");
        run(Command::new(program("ovsdb-tool"))
            .arg("create")
            .args([&file, &schema()]));
        let database = Command::new(program("ovsdb-server"))
            .args(["-vconsole:off", "-vfile:off", "-vsyslog:off"])
            .arg(file)
            .arg(remote("punix:", directory.path()))
            .arg(format!(
                "--unixctl={}/ovsdb.ctl",
                directory.path().display()
            ))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let ovs = Self {
            directory,
            database,
            switch: None,
        };
        until("the database listens", || {
            UnixStream::connect(ovs.path("db.sock")).is_ok()
        });
        ovs.vsctl("--no-wait init");
        ovs
    }

    /// With a switch, and a bridge `br-int` that drops everything.
    pub(crate) fn switch() -> Self {
        let mut ovs = Self::database();
        ovs.start_switch();
        ovs.vsctl("add-br br-int -- set bridge br-int datapath-type=dummy fail-mode=secure");
        ovs
    }

    pub(crate) fn start_switch(&mut self) {
        let child = Command::new(program("ovs-vswitchd"))
            // Of no datapath but the dummy one: it is not to touch what this host has.
            .args(["--enable-dummy=override", "-vconsole:off", "-vsyslog:off"])
            .arg(format!("unix:{}", self.path("db.sock").display()))
            .arg(format!("--unixctl={}", self.path("vswitchd.ctl").display()))
            .env("OVS_RUNDIR", self.directory.path())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        self.switch = Some(child);
    }

    /// Ends the switch without a chance to say goodbye.
    pub(crate) fn kill_switch(&mut self) {
        let mut switch = self.switch.take().unwrap();
        switch.kill().unwrap();
        switch.wait().unwrap();
        // Which it could not.
        let _ = std::fs::remove_file(self.management());
    }

    /// Stops or continues the switch's process.
    pub(crate) fn signal_switch(&self, signal: Signal) {
        let pid = self.switch.as_ref().unwrap().id();
        kill(Pid::from_raw(pid.try_into().unwrap()), signal).unwrap();
    }

    /// The address of the database.
    pub(crate) fn remote(&self) -> String {
        format!("unix:{}", self.path("db.sock").display())
    }

    /// The socket of `br-int`.
    pub(crate) fn management(&self) -> PathBuf {
        self.path("br-int.mgmt")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Runs `ovs-vsctl` with arguments that have no spaces in them.
    pub(crate) fn vsctl(&self, arguments: &str) -> String {
        run(Command::new(program("ovs-vsctl"))
            .arg(format!("--db={}", self.remote()))
            .args(["--timeout=20", "-vsyslog:off"])
            .args(arguments.split_whitespace()))
    }

    /// Runs `ovs-ofctl` on `br-int`.
    pub(crate) fn ofctl(&self, command: &str, arguments: &[&str]) -> String {
        run(Command::new(program("ovs-ofctl"))
            .args(["--timeout=20", "-vsyslog:off", ALL_VERSIONS, command])
            .arg(self.management())
            .args(arguments))
    }

    /// How many packets the flows with this text in them have seen.
    pub(crate) fn packets(&self, flow: &str) -> u64 {
        let flows = self.ofctl("dump-flows", &[]);
        let line = flows.lines().find(|line| line.contains(flow));
        let line = line.unwrap_or_else(|| panic!("no {flow} in {flows}"));
        let count = line.split("n_packets=").nth(1).unwrap();
        count.split(',').next().unwrap().parse().unwrap()
    }
}

impl Drop for Ovs {
    fn drop(&mut self) {
        for child in self.switch.iter_mut().chain([&mut self.database]) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Waits, without a runtime.
pub(crate) fn until(what: &str, mut there: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !there() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Panics when `future` takes longer than a test should.
pub(crate) async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future)
        .await
        .expect("it takes too long")
}

fn remote(kind: &str, directory: &Path) -> String {
    format!("--remote={kind}{}", directory.join("db.sock").display())
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Where `make tools` puts Open vSwitch's programs.
fn cached() -> Option<PathBuf> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty());
    let cache = set("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(set("HOME")?).join(".cache")))?;
    Some(cache.join("segue/image-bin"))
}

/// Where a program of Open vSwitch is: `SEGUE_OVS_BIN`, or else where `make tools` puts them, the path and where Debian
/// puts daemons.
fn program(name: &str) -> PathBuf {
    let directories: Vec<PathBuf> = match env::var_os("SEGUE_OVS_BIN") {
        Some(directory) => vec![directory.into()],
        None => cached()
            .into_iter()
            .chain(env::split_paths(&env::var_os("PATH").unwrap_or_default()))
            .chain([PathBuf::from("/usr/sbin")])
            .collect(),
    };
    found(directories.iter().map(|directory| directory.join(name)))
}

fn schema() -> PathBuf {
    let ours = env::var_os("SEGUE_OVS_BIN")
        .map(PathBuf::from)
        .or_else(cached);
    let ours = ours.map(|directory| directory.join("schemas"));
    let system = PathBuf::from("/usr/share/openvswitch");
    found(
        ours.into_iter()
            .chain([system])
            .map(|directory| directory.join("vswitch.ovsschema")),
    )
}

fn found(candidates: impl Iterator<Item = PathBuf>) -> PathBuf {
    let candidates: Vec<PathBuf> = candidates.collect();
    let found = candidates.iter().find(|path| path.is_file());
    found.cloned().unwrap_or_else(|| {
        panic!(
            "none of {candidates:?} is there. These tests need a real Open vSwitch: `make tools`, `apt-get install \
             openvswitch-switch`, or SEGUE_OVS_BIN set to the directory that has one"
        )
    })
}
