//! A server process: where it runs, where it logs, and that it does not outlive us.

use std::{
    ffi::OsString,
    fs::File,
    io,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use nix::{
    sys::{
        prctl,
        signal::{Signal, kill},
    },
    unistd::Pid,
};
use tokio::{process::Child, sync::oneshot, time::timeout};

use super::Error;

/// Turns a program and its arguments into a command that runs them in the right place: a network namespace, say.
///
/// The command has to become the program by `exec`, as `ip netns exec` does (a command that stays as the program's
/// parent would be stopped in its place), and the program has to see the files that this process sees.
pub type Spawner = Arc<dyn Fn(&[OsString]) -> Command + Send + Sync>;

/// A [`Spawner`] for the place where this process runs.
pub fn here() -> Spawner {
    Arc::new(|argv| {
        let mut argv = argv.iter();
        let mut command = Command::new(argv.next().map_or_else(OsString::new, OsString::clone));
        command.args(argv);
        command
    })
}

/// How long a server may take to end when asked to, before it is killed. Its data is thrown away: nothing is lost.
const GRACE: Duration = Duration::from_secs(5);
/// How much of a log an error shows.
const TAIL_LINES: usize = 15;

/// A running server. It is killed when dropped, and when this process dies, however it dies.
#[derive(Debug)]
pub(super) struct Process {
    name: &'static str,
    log: PathBuf,
    child: Child,
    /// Dropping it ends the thread that is the child's parent.
    _parent: mpsc::Sender<()>,
}

impl Process {
    /// Starts a server whose output goes to `log`.
    pub(super) async fn start(
        name: &'static str,
        command: Command,
        log: PathBuf,
    ) -> Result<Self, Error> {
        let program = PathBuf::from(command.get_program());
        let output = File::create(&log).map_err(Error::file(&log))?;
        let errors = output.try_clone().map_err(Error::file(&log))?;
        let (parent, until_dropped) = mpsc::channel();
        let child = spawn_from_own_thread(command, output, errors, until_dropped)
            .await
            .map_err(|source| Error::Spawn { program, source })?;
        Ok(Self {
            name,
            log,
            child,
            _parent: parent,
        })
    }

    /// Waits until the server ends on its own, and reports it with the end of its log.
    pub(super) async fn died(&mut self) -> Error {
        match self.child.wait().await {
            Ok(status) => Error::Exited {
                name: self.name,
                status,
                log: self.log.clone(),
                tail: self.log_tail(),
            },
            Err(source) => Error::File {
                path: self.log.clone(),
                source,
            },
        }
    }

    /// How the server ended, if it did.
    pub(super) fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    pub(super) fn log(&self) -> &Path {
        &self.log
    }

    /// The last lines that the server logged.
    pub(super) fn log_tail(&self) -> String {
        let log = std::fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<_> = log.lines().collect();
        lines
            .get(lines.len().saturating_sub(TAIL_LINES)..)
            .unwrap_or_default()
            .join("\n")
    }

    /// Asks the server to end, and kills it when it does not within some seconds.
    pub(super) async fn stop(mut self) -> Result<(), Error> {
        let failed = Error::file(self.log.clone());
        // No id: it has ended and was waited for.
        let Some(pid) = self.child.id() else {
            return Ok(());
        };
        // ESRCH cannot be: the child is not waited for yet, so its id is still its own.
        kill(Pid::from_raw(pid.cast_signed()), Signal::SIGTERM).map_err(|errno| Error::File {
            path: self.log.clone(),
            source: errno.into(),
        })?;
        match timeout(GRACE, self.child.wait()).await {
            Ok(ended) => ended.map(drop).map_err(failed),
            Err(_) => self.child.kill().await.map_err(failed),
        }
    }
}

/// Starts a child with `PR_SET_PDEATHSIG` from a thread made for it.
///
/// The signal is sent when the *thread* that forked ends (prctl(2)), and a runtime's threads come and go. This one
/// lives until `until_dropped` says that the child is not wanted any more.
async fn spawn_from_own_thread(
    mut command: Command,
    output: File,
    errors: File,
    until_dropped: mpsc::Receiver<()>,
) -> io::Result<Child> {
    let runtime = tokio::runtime::Handle::current();
    let (started, child) = oneshot::channel();
    command.stdin(Stdio::null()).stdout(output).stderr(errors);
    // Ctrl-C in a terminal goes to the whole foreground group; the servers are stopped in order instead.
    command.process_group(0);
    // SAFETY: the hook makes one system call and allocates nothing.
    unsafe {
        command.pre_exec(|| prctl::set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from));
    }
    thread::Builder::new()
        .name("server-parent".into())
        .spawn(move || {
            let _runtime = runtime.enter();
            let mut command = tokio::process::Command::from(command);
            // A failed send means that the caller is gone; then the child is dropped, and so killed, right here.
            let _ = started.send(command.kill_on_drop(true).spawn());
            let _ = until_dropped.recv();
        })?;
    child
        .await
        .unwrap_or_else(|_| Err(io::Error::other("the thread that starts it ended")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        here()(&["/bin/sh".into(), "-c".into(), script.into()])
    }

    #[tokio::test]
    async fn the_end_of_the_log_is_in_the_error_of_a_server_that_dies() {
        let directory = tempfile::tempdir().unwrap();
        let command = shell("seq 1 100; echo cannot bind >&2; exit 7");
        let mut process = Process::start("server", command, directory.path().join("log"))
            .await
            .unwrap();
        let error = process.died().await.to_string();
        assert!(
            error.contains("exit status: 7") && error.ends_with("100\ncannot bind"),
            "{error}"
        );
        assert!(!error.contains("\n80\n"), "only the end: {error}");
    }

    #[tokio::test]
    async fn a_server_is_stopped_by_sigterm_and_is_gone_when_stop_returns() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let command = shell("trap 'echo bye; exit' TERM; echo ready; while :; do sleep 0.01; done");
        let process = Process::start("server", command, log.clone())
            .await
            .unwrap();
        while !process.log_tail().contains("ready") {
            tokio::task::yield_now().await;
        }
        let pid = Pid::from_raw(process.child.id().unwrap().cast_signed());
        process.stop().await.unwrap();
        assert!(std::fs::read_to_string(log).unwrap().contains("bye"));
        assert_eq!(kill(pid, None), Err(nix::errno::Errno::ESRCH));
    }

    #[tokio::test]
    async fn a_program_that_does_not_exist_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let command = here()(&["/nonexistent/etcd".into()]);
        let error = Process::start("etcd", command, directory.path().join("log"))
            .await
            .unwrap_err();
        assert_eq!(error.to_string(), "cannot start /nonexistent/etcd");
    }
}
