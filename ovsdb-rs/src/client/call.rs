//! One call: the caller's end, the session's end, and who of the two decides that it was sent.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use serde_json::value::RawValue;
use tokio::sync::{mpsc, oneshot};

use crate::LockState;
use crate::monitor::Monitor;
use crate::wire::message::RpcError;

/// What callers ask of the session.
pub(crate) enum Command {
    Call(Call),
    /// Nobody waits for the call any more.
    Abandon(u64),
    AddMonitor(Box<Monitor>),
    RemoveMonitor(u64),
    Lock(LockRequest),
    Unlock {
        name: String,
        reply: Option<Reply>,
    },
}

pub(crate) type Commands = mpsc::UnboundedSender<Command>;
pub(crate) type Reply = oneshot::Sender<Result<Box<RawValue>, CallError>>;

pub(crate) struct Call {
    pub(crate) id: u64,
    pub(crate) method: &'static str,
    pub(crate) params: Box<RawValue>,
    /// Whether it may be sent again when the connection is lost before the answer.
    pub(crate) idempotent: bool,
    pub(crate) stage: Stage,
    pub(crate) reply: Reply,
}

pub(crate) struct LockRequest {
    pub(crate) name: String,
    pub(crate) steal: bool,
    pub(crate) state: tokio::sync::watch::Sender<LockState>,
    /// Told of the answer to the first request.
    pub(crate) reply: Reply,
}

/// Why a call that was sent has no result.
#[derive(Clone, Debug)]
pub(crate) enum CallError {
    Rpc(RpcError),
    /// The connection was lost.
    Lost(String),
    /// This client has the lock already.
    LockInUse,
}

/// Whether a call was sent. Both ends move it on from "queued", and only one of them wins: a call
/// that its caller reports as not sent is never sent afterwards.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stage(Arc<AtomicU8>);

const QUEUED: u8 = 0;
const SENT: u8 = 1;
const ABANDONED: u8 = 2;

impl Stage {
    /// Claims the call for sending; false when its caller has given up.
    pub(crate) fn send(&self) -> bool {
        self.claim(SENT)
    }

    /// Claims the call for giving up; false when it was sent.
    pub(crate) fn abandon(&self) -> bool {
        self.claim(ABANDONED)
    }

    /// Makes a sent call one that is still to be sent.
    pub(crate) fn requeue(&self) {
        self.0.store(QUEUED, Ordering::Release);
    }

    fn claim(&self, stage: u8) -> bool {
        self.0
            .compare_exchange(QUEUED, stage, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }
}

/// Tells the session, when the caller stops waiting, that it need not go on.
pub(crate) struct AbandonOnDrop<'a> {
    pub(crate) commands: &'a Commands,
    pub(crate) id: u64,
    pub(crate) answered: bool,
}

impl Drop for AbandonOnDrop<'_> {
    fn drop(&mut self) {
        if !self.answered {
            // Without a session there is nothing left to tell.
            let _ = self.commands.send(Command::Abandon(self.id));
        }
    }
}
