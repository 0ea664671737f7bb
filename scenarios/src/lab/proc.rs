//! Processes, by what identifies them for good: the process id together with the time the process started.

use std::{fmt, fs, str::FromStr};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

/// Priority of everything in a host, setpriority(2).
pub(crate) const NICE: i32 = -15;

/// A process that a later one with the same process id is not mistaken for. Written `PID:START`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Process id in the root process namespace.
    pub pid: i32,
    /// When it started, in clock ticks since boot (field 22 of `/proc/PID/stat`, proc_pid_stat(5)).
    pub start: u64,
}

impl ProcessId {
    /// Identifies a running process.
    pub(crate) fn of(pid: i32) -> Result<Self> {
        let start = start_time(pid).with_context(|| format!("process {pid} is not running"))?;
        Ok(Self { pid, start })
    }

    /// Whether this very process still runs; a zombie does not.
    pub fn is_alive(self) -> bool {
        start_time(self.pid) == Some(self.start)
    }

    /// Gives the process's session precedence over other sessions, where the kernel divides time by session
    /// (sched_autogroup, sched(7)): there its own priority counts only within the session.
    pub(crate) fn prefer_session(self) {
        // Best effort: the file does not exist in kernels that do not do this.
        _ = fs::write(format!("/proc/{}/autogroup", self.pid), NICE.to_string());
    }

    /// Sends a signal, unless the process is gone.
    pub(crate) fn signal(self, signal: Signal) -> Result<()> {
        if !self.is_alive() {
            return Ok(());
        }
        match kill(Pid::from_raw(self.pid), signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(error) => {
                Err(error).with_context(|| format!("cannot send {signal} to process {}", self.pid))
            }
        }
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.pid, self.start)
    }
}

impl FromStr for ProcessId {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (pid, start) = text
            .split_once(':')
            .context("a process is written PID:START")?;
        Ok(Self {
            pid: pid.parse().context("process id")?,
            start: start.parse().context("start time")?,
        })
    }
}

/// Start time of a process that is neither gone nor a zombie.
fn start_time(pid: i32) -> Option<u64> {
    parse_start_time(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse_start_time(stat: &str) -> Option<u64> {
    // The second field is the command in parentheses, and may itself hold blanks and parentheses.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    // Field 3 is taken; field 22 is the 19th of the rest.
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_an_awkward_command_name() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 100 200 300";
        assert_eq!(parse_start_time(stat), Some(4711));
    }

    #[test]
    fn a_zombie_is_not_running() {
        let stat = "7 (a) Z 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 100 200 300";
        assert_eq!(parse_start_time(stat), None);
    }

    #[test]
    fn a_reused_process_id_is_another_process() {
        let me = ProcessId::of(std::process::id().cast_signed()).unwrap();
        assert!(me.is_alive());
        let other = ProcessId {
            start: me.start + 1,
            ..me
        };
        assert!(!other.is_alive());
        other.signal(Signal::SIGKILL).unwrap();
    }

    #[test]
    fn what_is_printed_parses_to_the_same() {
        let id = ProcessId {
            pid: 12,
            start: 345,
        };
        assert_eq!(id.to_string().parse::<ProcessId>().unwrap(), id);
        assert!("12".parse::<ProcessId>().is_err());
    }
}
