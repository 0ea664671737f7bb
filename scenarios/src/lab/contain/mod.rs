//! Running a program in a host as a container runtime would: with the rights and the paths that it is given, and no
//! others.
//!
//! It shares the host's network, host name and IPC, and has a root and a process namespace of its own. Its root is the
//! image, with the program in it and the given paths of the host mounted where they are wanted. What it may do is taken
//! from it before it starts: groups and user, capabilities, and the way to more of either.
//!
//! # Guarantees
//! - What is given is what is asked for: [`Contained::start`] compares both as the kernel has them, and ends what differs.
//! - It ends with the one who started it, and with the lab.
//!
//! # Caveats
//! A runtime also filters system calls (seccomp), which is not done here.

mod program;
mod rights;

use std::{
    fs::{self, File},
    path::PathBuf,
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Child;

use super::{
    Host,
    node::Bind,
    proc::{ProcessId, Prompt},
};
use program::path_in_root;
use rights::{Seen, rights_in};

pub use program::run;
pub use rights::{Capability, Rights};

/// The hidden subcommand that runs [`run`].
pub const VERB: &str = "contained";
/// How long a killed program may take to be gone.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// A program in a host, and all that it gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// The program, of this machine; it runs on the image's libraries.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Its environment, apart from `PATH` and `HOME`.
    pub environment: Vec<(String, String)>,
    /// Directories of this machine, and where it sees them.
    pub mounts: Vec<Bind>,
    /// What it may do.
    pub rights: Rights,
}

/// What the hidden subcommand is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spec {
    /// First process of the host.
    init: ProcessId,
    image: PathBuf,
    /// An empty directory on which the root is put together.
    root: PathBuf,
    program: PathBuf,
    args: Vec<String>,
    environment: Vec<(String, String)>,
    mounts: Vec<Bind>,
    rights: Rights,
}

/// A program that runs. Dropping it kills it.
#[derive(Debug)]
pub struct Contained {
    /// Sets the namespaces up and waits for the program.
    keeper: Child,
    program: ProcessId,
}

// === impl Contained ===

impl Contained {
    /// Starts a program in a host. What it writes goes to `log`.
    ///
    /// # Errors
    /// When it cannot be started, or the kernel has given it other rights than those asked for.
    pub async fn start(host: &Host, container: &Container, log: File) -> Result<Self> {
        let root = host.lab.state_dir().join("containers").join(host.name());
        fs::create_dir_all(&root).with_context(|| root.display().to_string())?;
        for Bind { source, .. } in &container.mounts {
            fs::create_dir_all(source).with_context(|| source.display().to_string())?;
        }
        let spec = Spec {
            init: host.init,
            image: super::Lab::attach(&host.lab)?.image().dir().to_owned(),
            root,
            program: container.program.clone(),
            args: container.args.clone(),
            environment: container.environment.clone(),
            mounts: container.mounts.clone(),
            rights: container.rights.clone(),
        };
        let mut command = tokio::process::Command::new(&host.exe);
        command
            .args([VERB, &serde_json::to_string(&spec)?])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .kill_on_drop(true);
        let mut keeper = command.spawn().context("start a container")?;
        let told = keeper.stdout.take().context("no standard output")?;
        let mut lines = BufReader::new(told).lines();
        let (mut program, mut is_ready) = (None, false);
        // Two processes write, so either line can be the first.
        while !(is_ready && program.is_some())
            && let Some(line) = lines.next_line().await.context("a container's keeper")?
        {
            match line.strip_prefix("pid ") {
                Some(pid) => program = Some(ProcessId::of(pid.parse().context("process id")?)?),
                None => is_ready = line == "ready",
            }
        }
        let (Some(program), true) = (program, is_ready) else {
            bail!("{} could not be started", container.program.display());
        };
        let started = Self { keeper, program };
        started.verify(container).await?;
        program.prefer();
        program.hasten(Prompt::Reacts);
        Ok(started)
    }

    /// The program's process.
    pub fn id(&self) -> ProcessId {
        self.program
    }

    /// Whether it has ended, and how.
    pub fn ended(&mut self) -> Result<Option<String>> {
        let ended = self.keeper.try_wait().context("a container")?;
        Ok(ended.map(|ended| ended.to_string()))
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.program.signal(signal)
    }

    /// Kills it as a crash would, and returns once it is gone.
    pub async fn kill(mut self) -> Result<()> {
        self.program.signal(Signal::SIGKILL)?;
        let gone = tokio::time::timeout(KILL_DEADLINE, self.keeper.wait()).await;
        gone.context("a killed container does not end")?
            .map(drop)
            .context("a container")
    }

    /// Asks it to end and returns once it has.
    ///
    /// # Errors
    /// When it does not end within `grace` (then it is killed), or ends with an error.
    pub async fn stop(mut self, grace: Duration) -> Result<()> {
        self.program.signal(Signal::SIGTERM)?;
        let ended = tokio::time::timeout(grace, self.keeper.wait())
            .await
            .with_context(|| format!("it did not end within {} s of SIGTERM", grace.as_secs()))?
            .context("a container")?;
        ensure!(ended.success(), "it ended with {ended}");
        Ok(())
    }

    /// What the kernel says of the program's rights is what they are to be.
    async fn verify(&self, container: &Container) -> Result<()> {
        let path = path_in_root(&container.program)?;
        let proc = PathBuf::from(format!("/proc/{}", self.program.pid));
        // Until it is executed it is still the one that gives its rights up.
        let executed = super::host::wait_until("a container's program to be executed", || {
            let exe = fs::read_link(proc.join("exe"));
            Ok(exe.is_ok_and(|exe| exe == path))
        });
        executed.await?;
        let status = fs::read_to_string(proc.join("status")).context("a container's status")?;
        let mounts = fs::read_to_string(proc.join("mounts")).context("a container's mounts")?;
        let found = rights_in(&status, &mounts).context("a container's rights")?;
        let due = Seen::of(&container.rights);
        ensure!(
            found == due,
            "the kernel has given a container other rights than those asked for: {found:x?}, not {due:x?}"
        );
        Ok(())
    }
}
