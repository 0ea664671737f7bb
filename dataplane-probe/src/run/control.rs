//! Asking the reflector, again and again if need be: the way there may be the very thing that is interrupted.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use super::Error;
use crate::control::{Finished, MAX_RESPONSE, Request, Response};
use crate::packets::RemoteLog;
use crate::wire::{Greeting, Role};

/// For one attempt, from connecting to the answer.
const ATTEMPT: Duration = Duration::from_secs(3);
/// Between two attempts.
const BETWEEN: Duration = Duration::from_millis(100);

/// Where to ask, and about what.
#[derive(Debug, Clone, Copy)]
pub(super) struct Control {
    target: SocketAddr,
    session: u64,
}

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum Failure {
    /// The network's fault, or nobody listens: worth another attempt.
    Network(io::Error),
    /// The reflector's decision.
    Refused(String),
    /// It is no reflector.
    Stranger(String),
}

impl Control {
    pub(super) fn new(target: SocketAddr, session: u64) -> Self {
        Self { target, session }
    }

    pub(super) fn session(&self) -> u64 {
        self.session
    }

    /// Asks once.
    pub(super) fn once(&self, request: &Request) -> Result<Response, Failure> {
        self.attempt(request, ATTEMPT)
    }

    /// Asks until there is an answer or `deadline` passes; at least once.
    pub(super) fn until(&self, request: &Request, deadline: Instant) -> Result<Response, Failure> {
        retry(deadline, |patience| self.attempt(request, patience))
    }

    /// Asks for the account.
    pub(super) fn finished(
        &self,
        request: &Request,
        deadline: Instant,
    ) -> Result<Finished, Failure> {
        match self.until(request, deadline)? {
            Response::Finished(finished) => Ok(*finished),
            other => Err(Failure::Stranger(format!(
                "it answered {other:?} where an account was asked for"
            ))),
        }
    }

    /// Asks for the log.
    pub(super) fn log(&self, deadline: Instant) -> Result<RemoteLog, Failure> {
        let session = self.session;
        match self.until(&Request::Log { session }, deadline)? {
            Response::Log(log) => Ok(log),
            other => Err(Failure::Stranger(format!(
                "it answered {other:?} where the log was asked for"
            ))),
        }
    }

    /// Opens the long stream.
    pub(super) fn open_stream(&self, deadline: Instant) -> Result<TcpStream, Failure> {
        retry(deadline, |patience| {
            Ok(self.connect(Role::Stream, patience)?)
        })
    }

    fn connect(&self, role: Role, patience: Duration) -> io::Result<TcpStream> {
        let mut connection = TcpStream::connect_timeout(&self.target, patience)?;
        connection.set_nodelay(true)?;
        connection.set_write_timeout(Some(patience))?;
        connection.write_all(
            &Greeting {
                role,
                session: self.session,
            }
            .encode(),
        )?;
        Ok(connection)
    }

    fn attempt(&self, request: &Request, patience: Duration) -> Result<Response, Failure> {
        let mut connection = self.connect(Role::Control, patience)?;
        connection.set_read_timeout(Some(patience))?;
        let mut line = serde_json::to_vec(request).map_err(io::Error::from)?;
        line.push(b'\n');
        connection.write_all(&line)?;
        let mut answer = Vec::new();
        BufReader::new(connection)
            .take(MAX_RESPONSE)
            .read_until(b'\n', &mut answer)?;
        if answer.is_empty() {
            return Err(Failure::Stranger(
                "it closed the connection without an answer".to_owned(),
            ));
        }
        match serde_json::from_slice(&answer) {
            Ok(Response::Refused { reason }) => Err(Failure::Refused(reason)),
            Ok(response) => Ok(response),
            Err(error) => Err(Failure::Stranger(format!(
                "its answer makes no sense ({error})"
            ))),
        }
    }
}

impl Failure {
    pub(super) fn into_error(self, target: SocketAddr, begun: Instant) -> Error {
        match self {
            Self::Network(error) => Error::Unreachable {
                target,
                waited: begun.elapsed(),
                reason: describe(&error),
            },
            Self::Refused(reason) => Error::Refused { target, reason },
            Self::Stranger(reason) => Error::NotAReflector { target, reason },
        }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Network(error) => out.write_str(&describe(error)),
            Self::Refused(reason) | Self::Stranger(reason) => out.write_str(reason),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Network(error)
    }
}

fn retry<T>(
    deadline: Instant,
    attempt: impl Fn(Duration) -> Result<T, Failure>,
) -> Result<T, Failure> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // A zero timeout is not allowed, and the last attempt deserves a moment.
        match attempt(left.clamp(Duration::from_millis(200), ATTEMPT)) {
            Err(Failure::Network(_)) if Instant::now() + BETWEEN < deadline => {
                thread::sleep(BETWEEN);
            }
            result => return result,
        }
    }
}

/// Timeouts of a socket read as "Resource temporarily unavailable", which tells nobody anything.
fn describe(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "no answer in time".to_owned(),
        _ => error.to_string(),
    }
}
