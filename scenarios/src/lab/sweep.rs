//! Taking a lab down, by its name alone: after a run, and after a run that could not do it itself.

use std::{
    fs, io,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow};
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{name::LabName, netns::Netns, state};

/// How long the kernel may take to end a killed process.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// What a sweep removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Names of network namespaces.
    pub namespaces: Vec<String>,
    /// How many processes were killed in them.
    pub processes: usize,
    /// Whether there was a state directory.
    pub state: bool,
}

impl Swept {
    /// Whether there was nothing to remove.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Removes everything that carries the lab's name: the processes in its network namespaces, the namespaces, the state,
/// after copying the logs to `logs/<host>/`.
///
/// # Guarantees
/// - Nothing is found by a record that a crash could have left stale: a process belongs to the lab if it is in one of
///   the lab's network namespaces, and a host's mounts end with the host's processes.
/// - An error ends nothing: the rest is removed, and every error is reported.
/// - Nothing else is touched, and the calling process is spared even inside one of the namespaces.
pub(crate) fn sweep(lab: &LabName, logs: Option<&Path>) -> Result<Swept> {
    let mut swept = Swept::default();
    let mut errors = Vec::new();

    let namespaces = Netns::of_lab(lab).unwrap_or_else(|error| {
        errors.push(error);
        Vec::new()
    });
    match kill_all(&namespaces) {
        Ok(processes) => swept.processes = processes,
        Err(error) => errors.push(error),
    }
    for netns in &namespaces {
        match netns.delete() {
            Ok(()) => swept.namespaces.push(netns.name().to_owned()),
            Err(error) => errors.push(error),
        }
    }
    // After the processes have ended: the logs are then complete.
    if let Some(Err(error)) = logs.map(|logs| copy_logs(lab, logs)) {
        errors.push(error);
    }
    match state::remove(lab) {
        Ok(existed) => swept.state = existed,
        Err(error) => errors.push(error),
    }

    if errors.is_empty() {
        return Ok(swept);
    }
    let all: Vec<_> = errors.iter().map(|error| format!("{error:#}")).collect();
    Err(anyhow!(
        "lab {lab} could not be removed entirely:\n  {}",
        all.join("\n  ")
    ))
}

/// Kills what is in the namespaces until nothing is, and returns how many processes that were.
fn kill_all(namespaces: &[Netns]) -> Result<usize> {
    let deadline = Instant::now() + KILL_DEADLINE;
    let mut killed = std::collections::HashSet::new();
    loop {
        let mut left = Vec::new();
        for netns in namespaces {
            left.extend(netns.pids()?);
        }
        if left.is_empty() {
            return Ok(killed.len());
        }
        if Instant::now() > deadline {
            return Err(anyhow!(
                "processes {left:?} do not end, {} s after SIGKILL",
                KILL_DEADLINE.as_secs()
            ));
        }
        for pid in left {
            match kill(Pid::from_raw(pid), Signal::SIGKILL) {
                Ok(()) => _ = killed.insert(pid),
                Err(Errno::ESRCH) => {}
                Err(error) => return Err(error).with_context(|| format!("kill process {pid}")),
            }
        }
        // Again, because a process may have started another while it was being looked for.
        thread::sleep(Duration::from_millis(5));
    }
}

fn copy_logs(lab: &LabName, logs: &Path) -> Result<()> {
    let hosts = lab.state_dir().join("hosts");
    let entries = match fs::read_dir(&hosts) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| hosts.display().to_string()),
    };
    for host in entries {
        let host = host?;
        copy_dir(&host.path().join("var/log"), &logs.join(host.file_name()))?;
    }
    Ok(())
}

fn copy_dir(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| to.display().to_string())?;
    for entry in fs::read_dir(from).with_context(|| from.display().to_string())? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy_dir(&source, &target)?;
        } else if kind.is_file() {
            fs::copy(&source, &target).with_context(|| source.display().to_string())?;
        }
    }
    Ok(())
}
