//! A host of a running lab.

use std::{
    fs,
    net::Ipv4Addr,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::{
    sched::{CloneFlags, setns},
    sys::signal::Signal,
};
use serde::{Deserialize, Serialize};

use super::{
    daemon::Daemon,
    exec::output,
    libvirt::Libvirt,
    name::LabName,
    netns::{self, Netns},
    node::EXEC_VERB,
    ovs::Ovs,
    proc::{ProcessId, Prompt},
};

/// What a host is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// OVN's databases and northd, and the underlay's switch.
    Central,
    /// Open vSwitch, ovn-controller and libvirt: guests run here.
    Node,
    /// A peer of the guests, attached to the last node.
    Client,
    /// A peer of the guests beyond OVN's gateways.
    Outside,
}

/// A host of a running lab: its own processes, network, root directory and name. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    pub(crate) lab: LabName,
    pub(crate) name: String,
    pub(crate) role: Role,
    /// Its address on the underlay; client and outside have none.
    pub(crate) underlay: Option<Ipv4Addr>,
    pub(crate) init: ProcessId,
    /// The program whose hidden subcommands start and enter hosts.
    pub(crate) exe: PathBuf,
}

/// A process inside a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostProcess {
    /// The process as this machine knows it.
    pub id: ProcessId,
    /// Its program's name, cut to 15 characters by the kernel.
    pub comm: String,
    /// Its command line.
    pub cmdline: Vec<String>,
}

impl HostProcess {
    pub(crate) fn is_guest(&self) -> bool {
        self.comm.starts_with("qemu-system")
    }

    /// It starts guests, which are not to have what it has.
    fn starts_guests(&self) -> bool {
        self.comm == "libvirtd"
    }
}

impl Host {
    /// `central`, `node1`…, `client` or `outside`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is there for.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Its address on the underlay, where tunnels and migrations go; client and outside have none.
    pub fn underlay(&self) -> Option<Ipv4Addr> {
        self.underlay
    }

    /// Its address on the network beside the underlay, for what the machines have to say to each other; client and outside
    /// have none.
    pub fn management(&self) -> Option<Ipv4Addr> {
        let [.., host] = self.underlay?.octets();
        Some(Ipv4Addr::new(172, 30, 1, host))
    }

    /// The name of its network namespace, for `ip netns exec`.
    pub fn netns_name(&self) -> String {
        self.lab.netns(&self.name)
    }

    pub(crate) fn netns(&self) -> Netns {
        Netns::new(self.netns_name())
    }

    /// Where this machine sees the host's own directories (`/run`, `/var/log` and so on).
    pub fn state_dir(&self) -> PathBuf {
        host_dir(&self.lab, &self.name)
    }

    /// Where this machine sees a path of the host that is below one of its own directories, such as `/run/ovn`.
    pub fn path(&self, in_host: &str) -> PathBuf {
        self.state_dir().join(in_host.trim_start_matches('/'))
    }

    /// As [`path`](Self::path), of a path as Kubernetes' objects have it.
    pub fn path_of(&self, in_host: &Path) -> PathBuf {
        below(&self.state_dir(), in_host)
    }

    /// A command that runs inside the host: its processes, network, host name, and the image as root. Add arguments as
    /// to any command; `.into()` makes it one of tokio's.
    ///
    /// The command ends when the one who waits for it is killed, and when the host is taken down.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(&self.exe);
        command
            .args([EXEC_VERB, "--init", &self.init.to_string(), "--", program])
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", "/root")
            .env("LC_ALL", "C.UTF-8");
        command
    }

    /// A command of this machine that runs in the host's network and in nothing else of it: for our own programs.
    ///
    /// It is killed when the lab is taken down.
    pub fn netns_command(&self, program: impl AsRef<std::ffi::OsStr>) -> Result<Command> {
        let mut command = Command::new(program);
        netns::run_in(&mut command, self.netns().open()?);
        Ok(command)
    }

    /// Runs a command inside the host to its end and returns its output; see [`output`](super::exec::output).
    pub async fn run<I, S>(&self, program: &str, args: I) -> Result<String>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<std::ffi::OsStr>,
    {
        let mut command = self.command(program);
        command.args(args);
        output(command).await.with_context(|| self.name.clone())
    }

    /// Moves the calling thread into the host's network. Threads that it starts later inherit it, so a program that
    /// calls this before it builds its tokio runtime opens all its sockets there.
    pub fn enter_netns(&self) -> Result<()> {
        setns(self.netns().open()?, CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("enter {}", self.netns_name()))
    }

    /// The host's Open vSwitch.
    pub fn ovs(&self) -> Ovs<'_> {
        Ovs::new(self)
    }

    /// The host's libvirt.
    pub fn libvirt(&self) -> Libvirt<'_> {
        Libvirt::new(self)
    }

    /// Whether the host's first process runs.
    pub fn is_up(&self) -> bool {
        self.init.is_alive()
    }

    /// Every process inside the host, its first one included.
    pub fn processes(&self) -> Result<Vec<HostProcess>> {
        let space = |pid: i32| {
            fs::metadata(format!("/proc/{pid}/ns/pid"))
                .map(|meta| meta.ino())
                .ok()
        };
        let wanted = space(self.init.pid).with_context(|| format!("{} is down", self.name))?;
        let mut found = Vec::new();
        for pid in self.netns().pids()? {
            // What ends while it is looked at is left out.
            if space(pid) != Some(wanted) {
                continue;
            }
            let (Ok(id), Ok(comm), Ok(cmdline)) = (
                ProcessId::of(pid),
                fs::read_to_string(format!("/proc/{pid}/comm")),
                fs::read(format!("/proc/{pid}/cmdline")),
            ) else {
                continue;
            };
            let cmdline = cmdline
                .split(|byte| *byte == 0)
                .filter(|word| !word.is_empty())
                .map(|word| String::from_utf8_lossy(word).into_owned())
                .collect();
            found.push(HostProcess {
                id,
                comm: comm.trim_end().to_owned(),
                cmdline,
            });
        }
        Ok(found)
    }

    /// The daemons that belong on this host.
    pub fn daemons(&self) -> &'static [Daemon] {
        Daemon::of(self.role)
    }

    /// The process of a daemon, if it runs.
    pub fn daemon(&self, daemon: Daemon) -> Result<Option<ProcessId>> {
        let wanted: String = daemon.program().chars().take(15).collect();
        let found = self.processes()?.into_iter().find(|process| {
            let has = |wanted: &str| process.cmdline.iter().any(|word| word.contains(wanted));
            // The process that watches over a daemon has the daemon's name.
            process.comm == wanted && !has(": monitoring pid ") && daemon.mark().is_none_or(has)
        });
        Ok(found.map(|process| process.id))
    }

    /// Sends a daemon a signal: SIGKILL makes it crash, SIGSTOP hang, SIGCONT go on.
    ///
    /// # Errors
    /// When the daemon does not run.
    pub fn signal(&self, daemon: Daemon, signal: Signal) -> Result<()> {
        let process = self
            .daemon(daemon)?
            .with_context(|| format!("{daemon} does not run on {}", self.name))?;
        process.signal(signal)
    }

    /// Starts a daemon of this host and returns once it serves.
    pub async fn start(&self, daemon: Daemon) -> Result<()> {
        let (program, args) = daemon.command_line();
        self.run(program, args)
            .await
            .with_context(|| format!("start {daemon}"))?;
        self.prefer()
    }

    /// Gives what runs in the host precedence over the rest of the machine: what is measured in milliseconds should not
    /// depend on whether something else is being compiled. To be repeated when something new has started.
    ///
    /// Daemons run the moment that they have something to do. As machines of their own the hosts would have a processor
    /// each; here they share two with every guest, and an emulated one computes whenever it can.
    pub fn prefer(&self) -> Result<()> {
        for process in self.processes()? {
            process.id.prefer();
            if process.starts_guests() {
                process.id.hasten_alone(Prompt::Serves);
            } else if !process.is_guest() {
                process.id.hasten(Prompt::Serves);
            }
        }
        Ok(())
    }

    /// Kills a daemon and returns once it is gone.
    pub async fn crash(&self, daemon: Daemon) -> Result<()> {
        let process = self
            .daemon(daemon)?
            .with_context(|| format!("{daemon} does not run on {}", self.name))?;
        process.signal(Signal::SIGKILL)?;
        wait_until(&format!("{daemon} on {} to end", self.name), || {
            Ok(!process.is_alive())
        })
        .await
    }

    pub(crate) fn create_file(&self, in_host: &str, content: &str) -> Result<()> {
        let path = self.path(in_host);
        fs::write(&path, content).with_context(|| path.display().to_string())
    }
}

/// Where this machine sees a host's own directories.
pub(crate) fn host_dir(lab: &LabName, host: &str) -> PathBuf {
    Path::new(&lab.state_dir()).join("hosts").join(host)
}

/// A path of a system whose root is a directory here. `/var/run` is a link to `/run` in Debian, and as a link it would
/// lead out of the directory.
pub(crate) fn below(root: &Path, absolute: &Path) -> PathBuf {
    let path = match absolute.strip_prefix("/var/run") {
        Ok(rest) => Path::new("/run").join(rest),
        Err(_) => absolute.to_owned(),
    };
    root.join(path.strip_prefix("/").unwrap_or(&path))
}

/// Looks until a condition holds that nothing announces.
///
/// # Errors
/// When it does not hold within 30 s, with what was waited for; or when looking fails.
pub(crate) async fn wait_until(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let looking = async {
        while !holds()? {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    };
    tokio::time::timeout(Duration::from_secs(30), looking)
        .await
        .with_context(|| format!("waited 30 s in vain for {what}"))?
}
