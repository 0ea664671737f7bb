//! `tcpdump` on the client and on both nodes while a VM migrates, and what it must agree with.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use futures::future::try_join_all;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::process::{Child, ChildStderr};
use tokio::time::{sleep, timeout};

use crate::capture::{FILES, Figures, Reported, compare};
use crate::lab::{Host, REFLECTOR};
use crate::report::{Check, Migration};

use super::Bench;
use super::checks::Checks;
use super::vm::RunningVm;

/// Where captures go: to a directory of this name beside the report, and in it one of its number
/// for each migration.
const DIR: &str = "capture";
/// In KiB: more than all of a migration, so that nothing is dropped while `tcpdump` waits for a
/// processor.
const BUFFER: &str = "16384";
/// Enough for the headers and for what the probe says of a packet.
const SNAPSHOT: &str = "192";
/// The kernel hands packets over once a second; then the last of them have been.
const HANDED_OVER: Duration = Duration::from_millis(1_200);
/// Starting and ending take it some milliseconds, more on a busy machine.
const DEADLINE: Duration = Duration::from_secs(20);

/// The captures of a scenario.
pub(super) struct Captures {
    dir: PathBuf,
    begun: AtomicU32,
}

/// The capture of one migration, in progress.
pub(super) struct Capture {
    dir: PathBuf,
    tcpdumps: Vec<Tcpdump>,
}

/// The capture of one migration.
pub(super) struct Captured {
    dir: PathBuf,
    /// What makes it incomplete, by host.
    dropped: Vec<String>,
}

struct Tcpdump {
    host: String,
    child: Child,
    stderr: BufReader<ChildStderr>,
}

impl Captures {
    /// They go below `out`. Those of an earlier run are removed.
    pub(super) fn below(out: &Path) -> Result<Self> {
        let dir = out.join(DIR);
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).with_context(|| dir.display().to_string());
            }
            _ => {}
        }
        Ok(Self {
            dir,
            begun: AtomicU32::new(0),
        })
    }

    /// Begins to capture a migration of a VM from one node to another.
    pub(super) async fn begin(
        &self,
        bench: &Bench<'_>,
        vm: &RunningVm,
        [source, target]: [&str; 2],
    ) -> Result<Capture> {
        let number = self.begun.fetch_add(1, Ordering::Relaxed) + 1;
        let dir = self.dir.join(number.to_string());
        fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
        let family = bench.scenario.probe.family.each().first();
        let address = vm.probed(*family.context("a probe without a family")?)?;
        let filter = format!("host {address} and port {REFLECTOR}");
        let hosts = ["client", source, target];
        let starting = hosts.into_iter().zip(FILES).map(|(host, file)| {
            let (file, filter) = (dir.join(file), &filter);
            async move { Tcpdump::start(bench.lab.host(host)?, &file, filter).await }
        });
        Ok(Capture {
            tcpdumps: try_join_all(starting).await?,
            dir,
        })
    }
}

impl Capture {
    /// Ends it, once everything that was sent is in the files.
    pub(super) async fn finish(self) -> Result<Captured> {
        sleep(HANDED_OVER).await;
        let ending = self.tcpdumps.into_iter().map(Tcpdump::finish);
        let dropped = try_join_all(ending).await?;
        Ok(Captured {
            dir: self.dir,
            dropped: dropped.into_iter().flatten().collect(),
        })
    }
}

impl Tcpdump {
    /// Returns once it captures.
    async fn start(host: &Host, file: &Path, filter: &str) -> Result<Self> {
        let mut command = host.command("nice");
        // At the lowest priority, to take no processor time from guest and probe; the buffer bridges
        // the wait. On all interfaces, because the target's tap comes during the migration. As root,
        // because the kernel clears the parent-death signal of a process that changes its user.
        command.args(["-n", "19", "tcpdump", "-i", "any", "-y", "LINUX_SLL2", "-p"]);
        command.args(["-Z", "root", "--nano", "-B", BUFFER, "-s", SNAPSHOT]);
        // The file is this machine's, the host has no directory for it.
        command.args(["-U", "-w", "-", filter]);
        let shown = file.display();
        command
            .stdin(Stdio::null())
            .stdout(File::create(file).with_context(|| shown.to_string())?)
            .stderr(Stdio::piped());
        let mut child = tokio::process::Command::from(command)
            // To be sent SIGINT as a group: what starts it in the host ignores that signal.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .context("start tcpdump")?;
        let stderr = child.stderr.take().context("no standard error")?;
        let mut tcpdump = Self {
            host: host.name().to_owned(),
            child,
            stderr: BufReader::new(stderr),
        };
        let listening = timeout(DEADLINE, tcpdump.listens()).await;
        listening
            .unwrap_or_else(|_| bail!("it did not begin in {} s", DEADLINE.as_secs()))
            .with_context(|| format!("tcpdump on {}", tcpdump.host))?;
        Ok(tcpdump)
    }

    async fn listens(&mut self) -> Result<()> {
        let mut said = String::new();
        while !said.contains("listening on") {
            if self.stderr.read_line(&mut said).await? == 0 {
                bail!("{}", said.trim());
            }
        }
        Ok(())
    }

    /// Ends it, and says what makes its capture incomplete, if anything does.
    async fn finish(mut self) -> Result<Option<String>> {
        let on = || format!("tcpdump on {}", self.host);
        let group = self.child.id().and_then(|id| i32::try_from(id).ok());
        let group = group.with_context(|| format!("{} has ended by itself", on()))?;
        killpg(Pid::from_raw(group), Signal::SIGINT).with_context(on)?;
        let mut said = String::new();
        let ending = async {
            self.stderr.read_to_string(&mut said).await?;
            anyhow::Ok(self.child.wait().await?)
        };
        let status = timeout(DEADLINE, ending).await;
        let status = status
            .with_context(|| format!("{} did not end in {} s", on(), DEADLINE.as_secs()))?
            .with_context(on)?;
        let counted = dropped(&said).filter(|_| status.success());
        Ok(match counted {
            Some(0) => None,
            Some(packets) => Some(format!("{packets} packets dropped on {}", self.host)),
            None => Some(format!("{} ended with {status}: {}", on(), said.trim())),
        })
    }
}

/// How many packets the kernel had no room for, from what `tcpdump` says at its end.
fn dropped(said: &str) -> Option<u64> {
    let mut lines = said.lines();
    lines.find_map(|line| {
        let (count, rest) = line.split_once(' ')?;
        let of_packets = matches!(
            rest,
            "packets dropped by kernel" | "packet dropped by kernel"
        );
        of_packets.then(|| count.parse().ok())?
    })
}

impl Captured {
    /// What the report says of the migration has to be what the capture says.
    pub(super) fn check(&self, migration: &Migration) -> Vec<Check> {
        let mut checks = Checks::default();
        let (vm, dir) = (&migration.vm, self.dir.display());
        checks.that(
            format!("the capture of {vm} in {dir} is complete"),
            self.dropped.is_empty(),
            || format!("the capture is incomplete: {}", self.dropped.join("; ")),
        );
        if !self.dropped.is_empty() {
            return checks.0;
        }
        let figures = Figures::of(&self.dir);
        checks.worked(
            format!("the capture of {vm} in {dir} can be read"),
            &figures,
        );
        for compared in figures
            .iter()
            .flat_map(|it| compare(it, &reported(migration)))
        {
            checks.that(
                format!(
                    "capture and report of {vm} agree, within {:.1}, on {}",
                    compared.within, compared.what
                ),
                compared.agrees(),
                || match compared.captured {
                    Some(captured) => format!(
                        "{captured:.1} by the capture, {:.1} by the report",
                        compared.reported
                    ),
                    None => format!(
                        "unknown to the capture, {:.1} by the report",
                        compared.reported
                    ),
                },
            );
        }
        checks.0
    }
}

/// What the report says, of what a capture tells as well.
fn reported(migration: &Migration) -> Reported {
    let Migration {
        to_vm,
        from_vm,
        tcp,
        ..
    } = migration;
    Reported {
        sent_to_vm: to_vm.sent,
        lost_to_vm: to_vm.lost + to_vm.losses.at_socket,
        duplicated_to_vm: to_vm.duplicated,
        received_from_vm: from_vm.received,
        lost_from_vm: from_vm.lost,
        duplicated_from_vm: from_vm.duplicated,
        longest_gap_from_vm_ms: from_vm.service_gap_ms,
        longest_stall_ms: tcp.survived.then_some(tcp.longest_stall_ms),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_are_read_as_tcpdump_prints_them() {
        let said = |dropped| {
            format!(
                "2 packets captured\n4 packets received by filter\n{dropped} dropped by kernel\n"
            )
        };
        assert_eq!(dropped(&said("0 packets")), Some(0));
        assert_eq!(dropped(&said("1 packet")), Some(1));
        assert_eq!(dropped(&said("12 packets")), Some(12));
        assert_eq!(dropped("2 packets captured\n"), None);
    }
}
