use tokio::sync::{oneshot, watch};

use super::call::{Command, Commands, LockRequest};
use super::{Client, from_now};
use crate::{Cause, Error};

/// A lock that this client holds or queues for (RFC 7047, sections 4.1.8 to 4.1.10); given up when
/// dropped.
///
/// # Caveats
/// - A lock belongs to a connection: it is lost with it, and requested again on the next.
/// - The state lags behind the server. What must not happen without the lock belongs in a
///   transaction with [`assert_lock`](crate::Transaction::assert_lock).
#[derive(Debug)]
pub struct Lock {
    name: String,
    commands: Commands,
    state: watch::Receiver<LockState>,
    call_timeout: std::time::Duration,
    given_up: bool,
}

/// Where a client stands with a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LockState {
    /// Somebody else holds it; this client is in the queue.
    Waiting,
    /// This client holds it.
    Held,
    /// It was stolen from this client, which is now first in the queue.
    Stolen,
    /// There is no connection; the lock is requested again, at the end of the queue, once there is.
    Disconnected,
}

impl Lock {
    /// Where this client stands, and as it changes from now on.
    pub fn state(&self) -> watch::Receiver<LockState> {
        from_now(&self.state)
    }

    /// Whether this client holds the lock, as far as it knows.
    pub fn is_held(&self) -> bool {
        *self.state.borrow() == LockState::Held
    }

    /// Gives the lock up, and returns once the server has answered.
    ///
    /// # Errors
    /// [`Error::NoReply`]: the lock is given up as soon as the server gets to it, or with the
    /// connection.
    pub async fn unlock(mut self) -> Result<(), Error> {
        const METHOD: &str = "unlock";
        self.given_up = true;
        let (reply, answer) = oneshot::channel();
        self.commands
            .send(Command::Unlock {
                name: self.name.clone(),
                reply: Some(reply),
            })
            .map_err(|_| Error::Shutdown)?;
        match tokio::time::timeout(self.call_timeout, answer).await {
            Ok(Ok(Ok(_))) => Ok(()),
            Ok(Ok(Err(error))) => Err(error.into_error(METHOD)),
            Ok(Err(_)) => Err(Error::Shutdown),
            Err(_) => Err(Error::NoReply {
                method: METHOD,
                cause: Cause::Deadline(self.call_timeout),
            }),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if !self.given_up {
            // Without a session the lock is gone already.
            let _ = self.commands.send(Command::Unlock {
                name: std::mem::take(&mut self.name),
                reply: None,
            });
        }
    }
}

/// Requests a lock and waits for the first answer.
pub(super) async fn request(client: &Client, name: &str, steal: bool) -> Result<Lock, Error> {
    let method = if steal { "steal" } else { "lock" };
    let (sender, state) = watch::channel(LockState::Disconnected);
    let (reply, answer) = oneshot::channel();
    client
        .commands
        .send(Command::Lock(LockRequest {
            name: name.to_owned(),
            steal,
            state: sender,
            reply,
        }))
        .map_err(|_| Error::Shutdown)?;
    // From here on, so that giving up the wait gives up the lock.
    let mut lock = Lock {
        name: name.to_owned(),
        commands: client.commands.clone(),
        state,
        call_timeout: client.call_timeout,
        given_up: false,
    };
    match tokio::time::timeout(client.call_timeout, answer).await {
        Ok(Ok(Ok(_))) => Ok(lock),
        Ok(Ok(Err(error))) => {
            // The session has no such entry, or one that is not this caller's.
            lock.given_up = true;
            Err(error.into_error(method))
        }
        Ok(Err(_)) => Err(Error::Shutdown),
        Err(_) => Err(Error::NoReply {
            method,
            cause: client.not_connected(client.call_timeout),
        }),
    }
}
