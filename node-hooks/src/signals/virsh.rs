//! libvirt's lifecycle events, by a child `virsh event`.
//!
//! `virsh event` says nothing when it has connected. So it is given two commands: the reply to the first, `hostname`,
//! has come over the connection that the second listens on. What that leaves open is the time of one call, the
//! registration; and a daemon that is stopped just then ends the child a little later, as keepalive messages tell it
//! (`virsh(1)`, `--keepalive-interval`). virsh flushes after every piece it prints, so a pipe delays nothing.

mod line;

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use nix::sys::prctl;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::process::{Child, ChildStderr, ChildStdout, Command};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::codec::FramedRead;

use crate::time::Nanos;

use super::Counts;
use super::follow::{Connection, Hypervisor, SourceError};
use super::lifecycle::Happened;
use super::lines::{Line, Lines};
use super::sockets::SocketFile;

const COMMANDS: &str = "hostname; event --event lifecycle --loop --timestamp";
/// A daemon that has just been started with its launcher may be slow; one that is stopped never answers.
const DEADLINE: Duration = Duration::from_secs(10);
/// A connection that is silent for this long, times [`KEEPALIVE_COUNT`] and one, is given up by virsh.
const KEEPALIVE_SECONDS: &str = "5";
const KEEPALIVE_COUNT: &str = "3";
/// A domain's name is limited by nothing but its file's, of 255 bytes.
const LONGEST_LINE: usize = 4096;
/// Lines of complaints; virsh says what went wrong in one or two.
const KEPT: usize = 3;
/// A libvirt daemon.
#[derive(Debug)]
pub(super) struct Virsh {
    pub(super) program: PathBuf,
    pub(super) daemon: Daemon,
    pub(super) counts: Arc<Counts>,
    /// How many may be starting at once: a node may have a hundred launchers, and an agent that restarts all at once.
    pub(super) starting: Arc<Semaphore>,
}

/// How it is reached.
#[derive(Clone, Debug)]
pub(super) enum Daemon {
    Uri(String),
    Socket(SocketFile),
}

/// A child that has connected. It is killed when this is dropped.
pub(super) struct Running {
    child: Group,
    lines: FramedRead<ChildStdout, Lines>,
    complaints: Complaints,
    counts: Arc<Counts>,
}

/// A child that leads a process group.
struct Group(Child);

/// What the child prints to standard error: read, so that it is never kept waiting, and the first of it kept.
struct Complaints {
    lines: Option<FramedRead<ChildStderr, Lines>>,
    kept: Vec<String>,
}

// === impl Virsh ===

impl Hypervisor for Virsh {
    type Connection = Running;

    async fn connect(&self) -> Result<Running, SourceError> {
        let _one_of_few = self.starting.acquire().await;
        let mut running = self.start()?;
        match timeout(DEADLINE, running.line()).await {
            Ok(Ok(_host_name)) => Ok(running),
            Ok(Err(error)) => Err(error),
            Err(_late) => Err(SourceError::Deadline(DEADLINE)),
        }
    }
}

impl Virsh {
    fn start(&self) -> Result<Running, SourceError> {
        let (uri, input) = self.daemon.address()?;
        let mut command = Command::new(&self.program);
        command
            .args(["--readonly", "--quiet"])
            .args(["--keepalive-interval", KEEPALIVE_SECONDS])
            .args(["--keepalive-count", KEEPALIVE_COUNT])
            .args(["--connect", &uri, COMMANDS])
            // The words of events are translated.
            .env("LC_ALL", "C")
            .env("LIBVIRT_AUTOSTART", "0")
            .env_remove("VIRSH_DEBUG")
            .env_remove("LIBVIRT_DEBUG")
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        let parent = Pid::this();
        // SAFETY: between fork and exec only two system calls are made, prctl and getppid, which are async-signal-safe.
        unsafe {
            command.pre_exec(move || end_with(parent));
        }
        let mut child = command.spawn().map_err(|source| SourceError::Start {
            program: self.program.display().to_string(),
            source,
        })?;
        let (Some(output), errors) = (child.stdout.take(), child.stderr.take()) else {
            return Err(SourceError::Ended("it has no output".to_owned()));
        };
        Ok(Running {
            child: Group(child),
            lines: FramedRead::new(output, Lines::new(LONGEST_LINE)),
            complaints: Complaints {
                lines: errors.map(|errors| FramedRead::new(errors, Lines::new(LONGEST_LINE))),
                kept: Vec::new(),
            },
            counts: self.counts.clone(),
        })
    }
}

/// Has the kernel end the calling process with its parent, however that ends: nobody else would, outside of a container.
fn end_with(parent: Pid) -> io::Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    // It may have ended before.
    if nix::unistd::getppid() == parent {
        Ok(())
    } else {
        Err(io::ErrorKind::BrokenPipe.into())
    }
}

impl Daemon {
    /// Its URI, and the standard input that goes with it.
    ///
    /// A socket is handed over as an open file, which virsh's standard input is good for, as it reads nothing from it:
    /// then neither the length of its path nor who changes it matters.
    fn address(&self) -> Result<(String, Stdio), SourceError> {
        match self {
            Self::Uri(uri) => Ok((uri.clone(), Stdio::null())),
            Self::Socket(socket) => {
                let file: OwnedFd = socket.open().map_err(SourceError::reaching)?;
                let path = socket.driver_path();
                let uri = format!("qemu+unix:///{path}?socket=/proc/self/fd/0");
                Ok((uri, file.into()))
            }
        }
    }
}

// === impl Running ===

impl Connection for Running {
    async fn next(&mut self) -> Result<Happened, SourceError> {
        loop {
            let line = self.line().await?;
            let seen = Nanos::now();
            match line::parse(&line) {
                Ok(None) => {}
                Ok(Some(event)) => {
                    return Ok(Happened {
                        domain: event.domain.to_owned(),
                        change: event.change,
                        at: event.at,
                        seen,
                    });
                }
                Err(line::Malformed) => self.malformed(&line),
            }
        }
    }
}

impl Running {
    /// The next line that is not too long.
    async fn line(&mut self) -> Result<Bytes, SourceError> {
        loop {
            tokio::select! {
                biased;
                line = self.lines.next() => match line {
                    Some(Ok(Line::Whole(line))) => return Ok(line),
                    Some(Ok(Line::TooLong)) => self.malformed(b"(too long)"),
                    Some(Err(error)) => return Err(error.into()),
                    None => return Err(SourceError::Ended(self.why().await)),
                },
                () = self.complaints.take() => {}
            }
        }
    }

    fn malformed(&self, line: &[u8]) {
        self.counts.malformed.fetch_add(1, Relaxed);
        tracing::debug!(line = %line.escape_ascii(), "not a line of virsh event");
    }

    /// Why it ended, as it says itself.
    async fn why(&mut self) -> String {
        const MOMENT: Duration = Duration::from_secs(1);
        let rest = async {
            while self.complaints.lines.is_some() {
                self.complaints.take().await;
            }
            self.child.0.wait().await
        };
        let status = timeout(MOMENT, rest).await;
        let how = match status {
            Ok(Ok(status)) => status.to_string(),
            _ => "its output was closed".to_owned(),
        };
        let mut why = vec![how];
        why.append(&mut self.complaints.kept);
        why.join("; ")
    }
}

impl Complaints {
    /// Takes in the next line; none comes after the last. Cancel safe.
    async fn take(&mut self) {
        let Some(lines) = &mut self.lines else {
            return std::future::pending().await;
        };
        match lines.next().await {
            Some(Ok(Line::Whole(line))) if !line.is_empty() && self.kept.len() < KEPT => {
                self.kept.push(line.escape_ascii().to_string());
            }
            Some(Ok(_)) => {}
            Some(Err(_)) | None => self.lines = None,
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Not yet waited for, so the number is still its own. What it may have started itself goes with it.
        if let Some(id) = self.0.id().and_then(|id| i32::try_from(id).ok()) {
            let _ = killpg(Pid::from_raw(id), Signal::SIGKILL);
        }
    }
}

#[cfg(test)]
mod tests;
