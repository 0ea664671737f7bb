//! Processes, by what identifies them for good: the process id together with the time the process started.

use std::{
    fmt, fs, os::unix::process::CommandExt as _, process::Command, str::FromStr, time::Duration,
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::{Pid, SysconfVar, sysconf},
};
use serde::{Deserialize, Serialize};

/// Priority of everything in a host, setpriority(2).
const NICE: i32 = -15;
/// How prompt something is among what has real-time priority, sched(7). A probe's threads have more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Prompt {
    /// It comes before guests.
    Reconciles = 1,
    /// It forwards packets, or runs guests.
    Serves = 2,
    /// It passes on that a guest pauses.
    Reacts = 3,
}

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

    /// Gives the process precedence over the rest of the machine.
    pub(crate) fn prefer(self) {
        // Where the kernel divides time by session a process's own priority counts only within the session
        // (sched_autogroup, sched(7)). All of this is best effort: the file does not exist in kernels that do not.
        _ = fs::write(format!("/proc/{}/autogroup", self.pid), NICE.to_string());
        for thread in self.threads() {
            _ = make_nice(thread);
        }
    }

    /// Has the process run the moment that it has something to do, whatever guests do. What is more prompt stays so.
    pub(crate) fn hasten(self, prompt: Prompt) {
        for thread in self.threads() {
            hasten(thread, prompt, libc::SCHED_RR);
        }
    }

    /// As [`hasten`](Self::hasten), but what it starts from now on, threads too, runs as anything does.
    pub(crate) fn hasten_alone(self, prompt: Prompt) {
        for thread in self.threads() {
            hasten(thread, prompt, libc::SCHED_RR | libc::SCHED_RESET_ON_FORK);
        }
    }

    /// As [`hasten`](Self::hasten), the threads of this name only.
    pub(crate) fn hasten_threads(self, name: &str, prompt: Prompt) {
        for thread in self.threads() {
            let comm = fs::read_to_string(format!("/proc/{}/task/{thread}/comm", self.pid));
            if comm.is_ok_and(|comm| comm.trim_end() == name) {
                hasten(thread, prompt, libc::SCHED_RR);
            }
        }
    }

    /// The processor time that those of the process's threads have used so far whose names are `wanted`.
    pub(crate) fn processor_time(self, wanted: impl Fn(&str) -> bool) -> Result<Duration> {
        let per_second = sysconf(SysconfVar::CLK_TCK).context("clock ticks a second")?;
        let per_second =
            u32::try_from(per_second.unwrap_or(100)).context("clock ticks a second")?;
        let mut used = None;
        for thread in self.threads() {
            let stat = fs::read_to_string(format!("/proc/{}/task/{thread}/stat", self.pid));
            let stat = stat.ok().and_then(|stat| parse_processor_time(&stat));
            if let Some((_, ticks)) = stat.filter(|(name, _)| wanted(name)) {
                *used.get_or_insert(0) += ticks;
            }
        }
        let ticks = used.with_context(|| format!("process {} has no such thread", self.pid))?;
        Ok(Duration::from_secs(ticks) / per_second)
    }

    fn threads(self) -> Vec<i32> {
        let entries = fs::read_dir(format!("/proc/{}/task", self.pid));
        let entries = entries.into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect()
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

/// Gives a command, and what it starts, the precedence of what runs in a host, and a session of its own.
pub(crate) fn prefer_at_start(command: &mut Command, prompt: Prompt) {
    // SAFETY: the hook makes a few system calls that take numbers, and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            Errno::result(libc::setsid())?;
            Ok(take_precedence(prompt)?)
        });
    }
}

/// Gives this process's calling thread, and what it starts, precedence over the rest of the machine, and lets it run the
/// moment that it has something to do. Allocates nothing.
pub(crate) fn take_precedence(prompt: Prompt) -> nix::Result<()> {
    make_nice(0)?;
    hasten(0, prompt, libc::SCHED_RR);
    Ok(())
}

fn make_nice(thread: i32) -> nix::Result<()> {
    // SAFETY: the call takes three numbers.
    let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, thread.cast_unsigned(), NICE) };
    Errno::result(result).map(drop)
}

/// Best effort: a container may be forbidden to. What has a higher priority keeps it.
fn hasten(thread: i32, prompt: Prompt, policy: libc::c_int) {
    let mut parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: `parameters` outlives the call, which only writes to it.
    let known = unsafe { libc::sched_getparam(thread, &raw mut parameters) } == 0;
    if known && parameters.sched_priority <= prompt as libc::c_int {
        parameters.sched_priority = prompt as libc::c_int;
        // SAFETY: `parameters` outlives the call, which only reads it.
        _ = unsafe { libc::sched_setscheduler(thread, policy, &raw const parameters) };
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

/// Name of a thread, and the clock ticks that it has used: fields 2, 14 and 15 of its `stat`.
fn parse_processor_time(stat: &str) -> Option<(String, u64)> {
    let (head, rest) = stat.rsplit_once(')')?;
    let (_, name) = head.split_once('(')?;
    let mut fields = rest.split_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some((name.to_owned(), user + system))
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
    fn processor_time_is_that_of_the_threads_meant() {
        let stat =
            "7 (CPU 0/TCG) S 1 7 7 0 -1 4194560 1 2 3 4 250 50 7 8 20 0 1 0 4711 100 200 300";
        assert_eq!(
            parse_processor_time(stat),
            Some(("CPU 0/TCG".to_owned(), 300))
        );
        let me = ProcessId::of(std::process::id().cast_signed()).unwrap();
        assert!(me.processor_time(|_| true).is_ok());
        assert!(me.processor_time(|name| name == "CPU 0/TCG").is_err());
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
