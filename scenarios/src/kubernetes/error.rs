//! What can go wrong with the Kubernetes server, and what to do about it.

use std::{io, path::PathBuf, process::ExitStatus, time::Duration};

/// Why the Kubernetes server, or something asked of it, failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There are no programs to run. The message of the build script says why and what to do.
    #[error("{reason}")]
    Assets {
        /// What is missing, and the remedy.
        reason: String,
    },
    /// A file of the server's directory cannot be read or written.
    #[error("{path}", path = path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A program cannot be started.
    #[error("cannot start {program}")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A server ended on its own.
    #[error("{name} ended ({status}); the end of {log}:\n{tail}", log = log.display())]
    Exited {
        /// `etcd` or `kube-apiserver`.
        name: &'static str,
        /// How it ended.
        status: ExitStatus,
        /// Its log.
        log: PathBuf,
        /// The last lines of the log.
        tail: String,
    },
    /// The API did not become ready in time.
    #[error("kube-apiserver was not ready after {} s: {last}; the end of {log}:\n{tail}", waited.as_secs(), log = log.display())]
    NotReady {
        /// How long it was waited for.
        waited: Duration,
        /// What the last attempt met.
        last: String,
        /// The log of kube-apiserver.
        log: PathBuf,
        /// The last lines of the log.
        tail: String,
    },
    /// The directory's path is too long for the Unix sockets of etcd in it.
    #[error("{path}: too long for a Unix socket, which takes {max} bytes; use a shorter directory", path = path.display())]
    SocketPath {
        /// The socket.
        path: PathBuf,
        /// The limit of `sockaddr_un`.
        max: usize,
    },
    /// Certificates cannot be made.
    #[error("cannot make the certificates of the Kubernetes server")]
    Certificate(#[from] rcgen::Error),
    /// A kubeconfig is not usable.
    #[error("kubeconfig {path}", path = path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What kube made of it.
        source: kube::config::KubeconfigError,
    },
    /// YAML of this crate or for a file cannot be converted.
    #[error("{what}: {reason}")]
    Yaml {
        /// What was converted.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The API refused or failed a request.
    #[error("{doing}")]
    Api {
        /// What was asked for.
        doing: String,
        /// What the API answered.
        source: Box<kube::Error>,
    },
    /// An object did not get into the state that was waited for.
    #[error("{what} within {} s", waited.as_secs())]
    Timeout {
        /// What did not happen.
        what: String,
        /// How long it was waited for.
        waited: Duration,
    },
    /// kubectl failed.
    #[error("`kubectl {arguments}` failed ({status}): {stderr}")]
    Kubectl {
        /// Its arguments, as typed.
        arguments: String,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote to standard error.
        stderr: String,
    },
}

impl Error {
    /// Turns an I/O error into one that names the file.
    pub(super) fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }

    /// Turns an error of the API into one that says what was asked for.
    pub(super) fn api(doing: impl Into<String>) -> impl FnOnce(kube::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Api {
            doing,
            source: Box::new(source),
        }
    }
}
