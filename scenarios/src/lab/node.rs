//! The first process of a host, and entering a host.
//!
//! A host's processes live in process, mount, host name, IPC and network namespaces of their own, with the image as
//! their root. Its first process ([`run_init`]) mounts, then reaps: whatever happens, killing that one process kills
//! everything in the host, because the kernel ends a process namespace with its first process (pid_namespaces(7)).

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::{
        prctl,
        signal::{SigHandler, SigSet, Signal, signal},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{Pid, chdir, dup2_stdout, pivot_root, sethostname, setsid},
};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, BufReader};

use super::{
    netns,
    proc::{ProcessId, Prompt, take_precedence},
};

/// The hidden subcommand that runs [`run_init`].
pub const INIT_VERB: &str = "node-init";
/// The hidden subcommand that runs [`run_in_node`].
pub const EXEC_VERB: &str = "node-exec";

/// What the first process of a host mounts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitSpec {
    /// Name of the host within its own namespace.
    pub hostname: String,
    /// The image, mounted read-only as root.
    pub image: PathBuf,
    /// An empty directory on which the host's root is put together.
    pub root: PathBuf,
    /// Files and directories of this machine that appear in the host.
    pub binds: Vec<Bind>,
}

/// A file or directory of this machine that appears in a host, at a path that the image has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    /// Path on this machine.
    pub source: PathBuf,
    /// Absolute path in the host.
    pub target: PathBuf,
    /// Whether the host may only read it.
    pub read_only: bool,
}

/// Which stage of [`run_init`] a process is to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum InitStage {
    /// Makes the namespaces, mounts and starts the second stage.
    #[default]
    Outer,
    /// First process of the process namespace.
    Inner,
}

/// Starts a host's first process in its network namespace and returns once the host can be entered.
pub(crate) async fn start_init(
    exe: &Path,
    netns: &netns::Netns,
    spec: &InitSpec,
    log: &Path,
) -> Result<ProcessId> {
    let mut command = Command::new(exe);
    command
        .args([INIT_VERB, &serde_json::to_string(spec)?])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::create(log).with_context(|| log.display().to_string())?);
    netns::run_in(&mut command, netns.open()?);
    let mut child = tokio::process::Command::from(command)
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot start {}", exe.display()))?;
    let mut lines = BufReader::new(child.stdout.take().context("no standard output")?).lines();
    let (mut init, mut ready) = (None, false);
    // Two processes write, so either line can be the first.
    while !(ready && init.is_some())
        && let Some(line) = lines
            .next_line()
            .await
            .context("output of the first process")?
    {
        match line.strip_prefix("pid ") {
            Some(pid) => {
                let pid = pid.parse().context("pid of the first process")?;
                init = Some(ProcessId::of(pid)?);
            }
            None => ready = line == "ready",
        }
    }
    let (true, Some(init)) = (ready, init) else {
        bail!(
            "the first process of {} did not start: {}",
            spec.hostname,
            fs::read_to_string(log).unwrap_or_default()
        );
    };
    child
        .wait()
        .await
        .context("outer stage of the first process")?;
    Ok(init)
}

/// Runs as a host's first process; the caller has already entered the host's network namespace.
///
/// Must be called before the process starts a thread: namespaces are changed for the calling thread only.
pub fn run_init(stage: InitStage, spec: &InitSpec) -> Result<()> {
    match stage {
        InitStage::Outer => init_outer(spec),
        InitStage::Inner => init_inner(spec),
    }
}

fn init_outer(spec: &InitSpec) -> Result<()> {
    unshare(
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWPID,
    )
    .context("new namespaces (are you root?)")?;
    sethostname(&spec.hostname).context("host name")?;
    // Slave, not private: a namespace name deleted outside must not be kept busy by this copy of the mounts.
    remount(Path::new("/"), MsFlags::MS_REC | MsFlags::MS_SLAVE)?;
    bind(&spec.image, &spec.root, true)?;
    for Bind {
        source,
        target,
        read_only,
    } in &spec.binds
    {
        bind(source, &inside(&spec.root, target), *read_only)?;
    }
    let devices = spec.root.join("dev");
    mount(
        Some("/dev"),
        &devices,
        None::<&str>,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        None::<&str>,
    )
    .context("bind /dev")?;
    // A new instance, because sysfs shows the network devices of the namespace that mounted it.
    mount(
        Some("sysfs"),
        &spec.root.join("sys"),
        Some("sysfs"),
        MsFlags::MS_RDONLY,
        None::<&str>,
    )
    .context("sysfs")?;

    let exe = std::env::current_exe().context("path of this program")?;
    let mut command = Command::new(exe);
    command.args([INIT_VERB, "--stage", "inner", &serde_json::to_string(spec)?]);
    let child = command
        .spawn()
        .context("inner stage of the first process")?;
    writeln!(io::stdout(), "pid {}", child.id()).context("standard output")?;
    Ok(())
}

fn init_inner(spec: &InitSpec) -> Result<()> {
    let children = SigSet::from_iter([Signal::SIGCHLD]);
    children.thread_block().context("block SIGCHLD")?;
    setsid().context("new session")?;
    take_precedence(Prompt::Serves).context("priority")?;
    mount(
        Some("proc"),
        &spec.root.join("proc"),
        Some("proc"),
        MsFlags::empty(),
        None::<&str>,
    )
    .context("proc")?;
    chdir(&spec.root).context("enter the root")?;
    // The old root ends up on top of the new one (pivot_root(2), "pivot_root(".", ".")") and is then let go.
    pivot_root(".", ".").context("pivot_root")?;
    umount2(".", MntFlags::MNT_DETACH).context("let go of the old root")?;
    chdir("/").context("enter the new root")?;

    writeln!(io::stdout(), "ready").context("standard output")?;
    dup2_stdout(
        File::options()
            .write(true)
            .open("/dev/null")
            .context("/dev/null")?,
    )
    .context("standard output")?;
    reap(&children)
}

/// Collects orphans for ever; only SIGKILL from outside ends the first process of a namespace without handlers.
fn reap(children: &SigSet) -> Result<()> {
    loop {
        children.wait().context("wait for SIGCHLD")?;
        // One pending signal can stand for many children.
        while let Ok(status) = waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG))
            && status != WaitStatus::StillAlive
        {}
    }
}

pub(crate) fn bind(source: &Path, target: &Path, read_only: bool) -> Result<()> {
    mount(
        Some(source),
        target,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .with_context(|| format!("bind {} to {}", source.display(), target.display()))?;
    if read_only {
        // Linux ignores other flags together with MS_BIND, so read-only takes a second step (mount(2)).
        remount(
            target,
            MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY,
        )?;
    }
    Ok(())
}

pub(crate) fn remount(target: &Path, flags: MsFlags) -> Result<()> {
    mount(None::<&str>, target, None::<&str>, flags, None::<&str>)
        .with_context(|| format!("remount {}", target.display()))
}

fn inside(root: &Path, absolute: &Path) -> PathBuf {
    root.join(absolute.strip_prefix("/").unwrap_or(absolute))
}

/// Runs a command inside a host and ends as it ended.
///
/// A process of its own in the host is needed because entering a process namespace is only effective for children
/// (setns(2)). The command is killed when this process is; the terminal's SIGINT and SIGQUIT are left to the command.
///
/// Must be called before the process starts a thread: namespaces are changed for the calling thread only.
pub fn run_in_node(init: ProcessId, command: &[String]) -> Result<ExitCode> {
    let (program, args) = command.split_first().context("no command given")?;
    let spaces = [
        ("pid", CloneFlags::CLONE_NEWPID),
        ("net", CloneFlags::CLONE_NEWNET),
        ("ipc", CloneFlags::CLONE_NEWIPC),
        ("uts", CloneFlags::CLONE_NEWUTS),
        ("mnt", CloneFlags::CLONE_NEWNS),
    ];
    let gone = || format!("the host's first process ({init}) is gone: the lab is down");
    let mut open = Vec::new();
    for (name, flag) in spaces {
        open.push((
            File::open(format!("/proc/{}/ns/{name}", init.pid)).with_context(gone)?,
            flag,
        ));
    }
    // After opening: now the files are known to be those of the right process.
    if !init.is_alive() {
        bail!(gone());
    }
    for (file, flag) in &open {
        setns(file, *flag).context("enter the host's namespaces")?;
    }
    drop(open);

    // SAFETY: ignoring a signal installs no handler.
    unsafe {
        signal(Signal::SIGINT, SigHandler::SigIgn).context("SIGINT")?;
        signal(Signal::SIGQUIT, SigHandler::SigIgn).context("SIGQUIT")?;
    }
    let mut command = Command::new(program);
    command.args(args);
    // SAFETY: the hook makes system calls only, and allocates nothing.
    unsafe {
        command.pre_exec(|| {
            signal(Signal::SIGINT, SigHandler::SigDfl)?;
            signal(Signal::SIGQUIT, SigHandler::SigDfl)?;
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            Ok(())
        });
    }
    let status = command
        .status()
        .with_context(|| format!("cannot start {program}"))?;
    // A shell's convention for a command that a signal ended.
    let code = status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)))
}
