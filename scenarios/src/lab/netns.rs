//! Named network namespaces, as `ip netns` keeps them.

use std::{
    fs::{self, File},
    io,
    os::unix::{fs::MetadataExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, setns};

use super::{
    exec::{command, output},
    name::LabName,
};

const NETNS_DIR: &str = "/run/netns";

/// A network namespace by its name; it need not exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Netns(String);

impl Netns {
    pub(crate) fn new(name: impl Into<String>) -> Self {
        Self(name.into())
    }

    /// Every namespace that carries the lab's name.
    pub(crate) fn of_lab(lab: &LabName) -> Result<Vec<Self>> {
        let entries = match fs::read_dir(NETNS_DIR) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).context(NETNS_DIR),
        };
        let prefix = lab.netns_prefix();
        let mut found = Vec::new();
        for entry in entries {
            let name = entry.context(NETNS_DIR)?.file_name();
            if let Some(name) = name.to_str().filter(|name| name.starts_with(&prefix)) {
                found.push(Self::new(name));
            }
        }
        found.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(found)
    }

    pub(crate) fn name(&self) -> &str {
        &self.0
    }

    pub(crate) fn path(&self) -> PathBuf {
        Path::new(NETNS_DIR).join(&self.0)
    }

    pub(crate) fn open(&self) -> Result<File> {
        File::open(self.path()).with_context(|| format!("network namespace {}", self.0))
    }

    pub(crate) async fn create(&self) -> Result<()> {
        output(command("ip", ["netns", "add", &self.0]))
            .await
            .map(drop)
    }

    /// Removes the name. The namespace itself lives as long as a process is in it.
    pub(crate) fn delete(&self) -> Result<()> {
        let output = command("ip", ["netns", "del", &self.0])
            .output()
            .context("cannot start `ip`")?;
        anyhow::ensure!(
            output.status.success(),
            "`ip netns del {}`: {}",
            self.0,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(())
    }

    /// The processes whose main thread is in the namespace, without this one.
    pub(crate) fn pids(&self) -> Result<Vec<i32>> {
        let wanted =
            fs::metadata(self.path()).with_context(|| format!("network namespace {}", self.0))?;
        let me = std::process::id().cast_signed();
        let mut pids = Vec::new();
        for entry in fs::read_dir("/proc").context("/proc")? {
            let Ok(entry) = entry else { continue };
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<i32>().ok())
            else {
                continue;
            };
            // A process that ended since the directory was read has no namespace, and neither has a zombie.
            let Ok(actual) = fs::metadata(entry.path().join("ns/net")) else {
                continue;
            };
            if pid != me && (actual.dev(), actual.ino()) == (wanted.dev(), wanted.ino()) {
                pids.push(pid);
            }
        }
        Ok(pids)
    }

    /// Runs `ip` inside the namespace, several commands in one go (one per line, without the leading `ip`).
    pub(crate) async fn ip(&self, lines: &[String]) -> Result<()> {
        for line in lines {
            let args = ["-n", &self.0].into_iter().chain(line.split_whitespace());
            output(command("ip", args)).await?;
        }
        Ok(())
    }
}

/// Makes `command` run in the network namespace behind `netns`, with everything else as it is here.
pub(crate) fn run_in(command: &mut Command, netns: File) {
    // SAFETY: the hook makes one system call on a descriptor that it owns, and allocates nothing.
    unsafe {
        command.pre_exec(move || setns(&netns, CloneFlags::CLONE_NEWNET).map_err(io::Error::from));
    }
}
