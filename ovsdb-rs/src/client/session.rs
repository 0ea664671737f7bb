//! What a session knows, and what it makes of each message: no I/O here, only buffers.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{debug, warn};
use uuid::Uuid;

use super::call::{Call, CallError, Command, LockRequest, Reply};
use crate::LockState;
use crate::monitor::update::TableUpdates;
use crate::monitor::{Monitor, Step};
use crate::wire::message::{self, Message, RpcError};

/// Calls, monitors and locks, across connections.
pub(super) struct Session {
    ids: Arc<AtomicU64>,
    setup_timeout: Duration,
    /// How long to wait before a monitor that was refused is requested again.
    refused_pause: Duration,
    /// Calls that no connection has carried yet.
    waiting: VecDeque<Call>,
    monitors: BTreeMap<u64, Monitored>,
    locks: BTreeMap<String, HeldLock>,
    connection: Option<Connection>,
}

/// What belongs to one connection and ends with it.
#[derive(Default)]
struct Connection {
    out: BytesMut,
    pending: HashMap<u64, Pending>,
    /// Whether the server has answered the first request. A listening socket accepts connections for
    /// a server that is frozen; nothing is sent before this that would have to be reported as
    /// possibly executed.
    ready: bool,
}

struct Monitored {
    monitor: Box<Monitor>,
    /// The id of the request under way; an answer to any other is out of date.
    request: Option<u64>,
    wakeup: Wakeup,
}

/// What a monitor needs time to pass for.
enum Wakeup {
    None,
    /// The answer to the monitor's request must have come.
    Answer(Instant),
    /// The monitor is requested again.
    Retry(Instant),
}

struct HeldLock {
    state: watch::Sender<LockState>,
    /// The id of the request under way; an answer to any other is to a lock given up since.
    request: Option<u64>,
    /// Not asked again after a reconnection: stealing is for once.
    steal: bool,
    reply: Option<Reply>,
}

/// What an answer is to.
enum Pending {
    Handshake,
    Probe,
    Call(Call),
    Monitor(u64),
    MonitorCancel,
    Lock(String),
    Unlock(Option<Reply>),
}

#[derive(Deserialize)]
struct Locked {
    locked: bool,
}

impl Session {
    pub(super) fn new(
        ids: Arc<AtomicU64>,
        setup_timeout: Duration,
        refused_pause: Duration,
    ) -> Self {
        Self {
            ids,
            setup_timeout,
            refused_pause,
            waiting: VecDeque::new(),
            monitors: BTreeMap::new(),
            locks: BTreeMap::new(),
            connection: None,
        }
    }

    /// What is to be written.
    pub(super) fn out(&mut self) -> Option<&mut BytesMut> {
        self.connection
            .as_mut()
            .map(|connection| &mut connection.out)
    }

    pub(super) fn is_ready(&self) -> bool {
        self.connection
            .as_ref()
            .is_some_and(|connection| connection.ready)
    }

    /// Begins with a fresh connection.
    pub(super) fn connected(&mut self) {
        self.connection = Some(Connection::default());
        // Without it the server hangs up whenever any of its databases changes role or schema.
        self.request("set_db_change_aware", &[true], Pending::Handshake);
    }

    /// Ends with the connection: what it had not answered is decided here.
    pub(super) fn disconnected(&mut self, reason: &str) {
        let Some(connection) = self.connection.take() else {
            return;
        };
        let mut retried = Vec::new();
        for pending in connection.pending.into_values() {
            match pending {
                Pending::Call(call) if call.idempotent => {
                    call.stage.requeue();
                    retried.push(call);
                }
                Pending::Call(Call { reply, .. }) => {
                    let _ = reply.send(Err(CallError::Lost(reason.to_owned())));
                }
                // The lock went with the connection, which is all that was asked for.
                Pending::Unlock(Some(reply)) => {
                    let _ = reply.send(Ok(RawValue::NULL.to_owned()));
                }
                _ => {}
            }
        }
        retried.sort_by_key(|call| call.id);
        self.waiting.extend(retried);
        for monitored in self.monitors.values_mut() {
            monitored.request = None;
            monitored.wakeup = Wakeup::None;
            monitored.monitor.disconnected();
        }
        for lock in self.locks.values_mut() {
            lock.steal &= lock.reply.is_some();
            lock.state.send_replace(LockState::Disconnected);
        }
    }

    pub(super) fn command(&mut self, command: Command, now: Instant) {
        match command {
            Command::Call(call) if self.is_ready() => self.send_call(call),
            Command::Call(call) => self.waiting.push_back(call),
            Command::Abandon(id) => self.abandon(id),
            Command::AddMonitor(monitor) => {
                let key = monitor.key();
                let monitored = Monitored {
                    monitor,
                    request: None,
                    wakeup: Wakeup::None,
                };
                self.monitors.insert(key, monitored);
                if self.is_ready() {
                    self.start_monitor(key, now);
                }
            }
            Command::RemoveMonitor(key) => {
                if self.monitors.remove(&key).is_some() && self.is_ready() {
                    self.request("monitor_cancel", &[key], Pending::MonitorCancel);
                }
            }
            Command::Lock(request) => self.add_lock(request),
            Command::Unlock { name, reply } => {
                self.locks.remove(&name);
                if self.is_ready() {
                    self.request("unlock", &[name], Pending::Unlock(reply));
                } else if let Some(reply) = reply {
                    let _ = reply.send(Ok(RawValue::NULL.to_owned()));
                }
            }
        }
    }

    /// Asks the server for a sign of life.
    pub(super) fn probe(&mut self) {
        self.request::<[(); 0]>("echo", &[], Pending::Probe);
    }

    /// When [`expire`](Self::expire) has something to do.
    pub(super) fn next_wakeup(&self) -> Option<Instant> {
        self.monitors
            .values()
            .filter_map(|monitored| match monitored.wakeup {
                Wakeup::None => None,
                Wakeup::Answer(at) | Wakeup::Retry(at) => Some(at),
            })
            .min()
    }

    /// Does what is due. An error ends the connection.
    pub(super) fn expire(&mut self, now: Instant) -> Result<(), String> {
        let mut retries = Vec::new();
        for (&key, monitored) in &mut self.monitors {
            match monitored.wakeup {
                Wakeup::Answer(at) if at <= now => {
                    return Err(format!(
                        "no answer to a monitor's request within {:?}",
                        self.setup_timeout
                    ));
                }
                Wakeup::Retry(at) if at <= now => retries.push(key),
                _ => {}
            }
        }
        for key in retries {
            self.start_monitor(key, now);
        }
        Ok(())
    }

    /// Takes a message. An error ends the connection.
    pub(super) fn received(&mut self, frame: &Bytes, now: Instant) -> Result<(), String> {
        let taken = Message::parse(frame).and_then(|message| match message {
            Message::Request { id, method, params } => self.answer(&id, &method, &params),
            Message::Notification { method, params } => self.notified(&method, &params, now),
            Message::Response { id, outcome } => self.answered(id, outcome, now),
        });
        if taken.is_err() {
            for monitored in self.monitors.values_mut() {
                monitored.monitor.distrust();
            }
        }
        taken
    }

    // === messages ===

    fn answer(&mut self, id: &RawValue, method: &str, params: &RawValue) -> Result<(), String> {
        let Some(connection) = &mut self.connection else {
            return Ok(());
        };
        let outcome = if method == "echo" {
            Ok(params)
        } else {
            Err("unknown method")
        };
        message::write_response(&mut connection.out, id, outcome)
            .map_err(|error| format!("answering {method}: {error}"))
    }

    fn notified(&mut self, method: &str, params: &RawValue, now: Instant) -> Result<(), String> {
        let wrong = |error: serde_json::Error| format!("{method} notification: {error}");
        match method {
            "update2" => {
                let (key, updates): (u64, TableUpdates) =
                    serde_json::from_str(params.get()).map_err(wrong)?;
                self.update(key, None, updates)
            }
            "update3" => {
                let (key, transaction, updates): (u64, Uuid, TableUpdates) =
                    serde_json::from_str(params.get()).map_err(wrong)?;
                self.update(key, Some(transaction), updates)
            }
            "monitor_canceled" => {
                let (key,): (u64,) = serde_json::from_str(params.get()).map_err(wrong)?;
                if let Some(monitored) = self.monitors.get_mut(&key) {
                    monitored.monitor.disconnected();
                    self.start_monitor(key, now);
                }
                Ok(())
            }
            "locked" | "stolen" => {
                let (name,): (String,) = serde_json::from_str(params.get()).map_err(wrong)?;
                if let Some(lock) = self.locks.get(&name) {
                    lock.state.send_replace(if method == "locked" {
                        LockState::Held
                    } else {
                        LockState::Stolen
                    });
                }
                Ok(())
            }
            other => {
                debug!(method = other, "notification ignored");
                Ok(())
            }
        }
    }

    fn update(
        &mut self,
        key: u64,
        transaction: Option<Uuid>,
        updates: TableUpdates,
    ) -> Result<(), String> {
        match self.monitors.get_mut(&key) {
            Some(monitored) => monitored.monitor.update(transaction, updates),
            // On its way while the monitor was being cancelled.
            None => Ok(()),
        }
    }

    fn answered(
        &mut self,
        id: u64,
        outcome: Result<Box<RawValue>, RpcError>,
        now: Instant,
    ) -> Result<(), String> {
        let pending = self
            .connection
            .as_mut()
            .and_then(|connection| connection.pending.remove(&id));
        match pending {
            // An older server does not know the request, and is as good.
            Some(Pending::Handshake) => {
                self.ready(now);
                Ok(())
            }
            Some(Pending::Call(call)) => {
                let _ = call.reply.send(outcome.map_err(CallError::Rpc));
                Ok(())
            }
            Some(Pending::Monitor(key)) => match self.monitors.get_mut(&key) {
                Some(monitored) if monitored.request == Some(id) => {
                    let step = monitored.monitor.answered(outcome)?;
                    self.step_monitor(key, step, now);
                    Ok(())
                }
                _ => Ok(()),
            },
            Some(Pending::Lock(name)) => self.lock_answered(id, &name, outcome),
            Some(Pending::Unlock(reply)) => {
                if let Some(reply) = reply {
                    let _ = reply.send(outcome.map_err(CallError::Rpc));
                }
                Ok(())
            }
            Some(Pending::Probe | Pending::MonitorCancel) => Ok(()),
            // The call was abandoned, or the server is confused; either way nobody waits.
            None => {
                debug!(id, "answer to no open request ignored");
                Ok(())
            }
        }
    }

    fn ready(&mut self, now: Instant) {
        if let Some(connection) = &mut self.connection {
            connection.ready = true;
        }
        // Locks first: calls that were waiting may assert them.
        let names: Vec<String> = self.locks.keys().cloned().collect();
        for name in names {
            self.request_lock(&name);
        }
        let keys: Vec<u64> = self.monitors.keys().copied().collect();
        for key in keys {
            self.start_monitor(key, now);
        }
        for call in std::mem::take(&mut self.waiting) {
            self.send_call(call);
        }
    }

    // === calls ===

    fn send_call(&mut self, call: Call) {
        if call.stage.send() {
            let params = call.params.clone();
            self.request_as(call.id, call.method, &params, Pending::Call(call));
        }
    }

    fn abandon(&mut self, id: u64) {
        self.waiting.retain(|call| call.id != id);
        let Some(connection) = &mut self.connection else {
            return;
        };
        if let Some(Pending::Call(call)) = connection.pending.remove(&id)
            && call.method == "transact"
        {
            // It may be waiting for rows that nobody waits for any more.
            let written = message::write_request(&mut connection.out, None, "cancel", &[id]);
            debug_assert!(written.is_ok(), "an array of one number is JSON");
        }
    }

    // === monitors ===

    fn start_monitor(&mut self, key: u64, now: Instant) {
        if let Some(monitored) = self.monitors.get_mut(&key) {
            let step = monitored.monitor.start();
            self.step_monitor(key, step, now);
        }
    }

    fn step_monitor(&mut self, key: u64, step: Step, now: Instant) {
        let (request, wakeup) = match step {
            Step::Request { method, params } => (
                Some(self.request(method, &params, Pending::Monitor(key))),
                Wakeup::Answer(now + self.setup_timeout),
            ),
            Step::Live => (None, Wakeup::None),
            Step::Refused => (None, Wakeup::Retry(now + self.refused_pause)),
        };
        if let Some(monitored) = self.monitors.get_mut(&key) {
            monitored.request = request;
            monitored.wakeup = wakeup;
        }
    }

    // === locks ===

    fn add_lock(&mut self, request: LockRequest) {
        let LockRequest {
            name,
            steal,
            state,
            reply,
        } = request;
        if self.locks.contains_key(&name) {
            let _ = reply.send(Err(CallError::LockInUse));
            return;
        }
        let reply = Some(reply);
        self.locks.insert(
            name.clone(),
            HeldLock {
                state,
                request: None,
                steal,
                reply,
            },
        );
        if self.is_ready() {
            self.request_lock(&name);
        }
    }

    fn request_lock(&mut self, name: &str) {
        let Some(lock) = self.locks.get(name) else {
            return;
        };
        let method = if lock.steal { "steal" } else { "lock" };
        let id = self.request(method, &[name], Pending::Lock(name.to_owned()));
        if let Some(lock) = self.locks.get_mut(name) {
            lock.request = Some(id);
        }
    }

    fn lock_answered(
        &mut self,
        id: u64,
        name: &str,
        outcome: Result<Box<RawValue>, RpcError>,
    ) -> Result<(), String> {
        let Some(lock) = self.locks.get_mut(name) else {
            return Ok(());
        };
        if lock.request.take_if(|request| *request == id).is_none() {
            return Ok(());
        }
        let reply = lock.reply.take();
        let result = match outcome {
            Ok(result) => result,
            Err(error) => {
                warn!(lock = name, error = error.name, "lock refused");
                if let Some(reply) = reply {
                    let _ = reply.send(Err(CallError::Rpc(error)));
                }
                self.locks.remove(name);
                return Ok(());
            }
        };
        let Locked { locked } = serde_json::from_str(result.get())
            .map_err(|error| format!("answer to lock {name:?}: {error}"))?;
        lock.steal = false;
        lock.state.send_replace(if locked {
            LockState::Held
        } else {
            LockState::Waiting
        });
        if let Some(reply) = reply {
            let _ = reply.send(Ok(result));
        }
        Ok(())
    }

    // === requests ===

    fn request<P: serde::Serialize + ?Sized>(
        &mut self,
        method: &str,
        params: &P,
        pending: Pending,
    ) -> u64 {
        let id = self.ids.fetch_add(1, Ordering::Relaxed);
        self.request_as(id, method, params, pending);
        id
    }

    fn request_as<P: serde::Serialize + ?Sized>(
        &mut self,
        id: u64,
        method: &str,
        params: &P,
        pending: Pending,
    ) {
        let Some(connection) = &mut self.connection else {
            return;
        };
        let written = message::write_request(&mut connection.out, Some(id), method, &params);
        debug_assert!(written.is_ok(), "parameters are JSON already");
        connection.pending.insert(id, pending);
    }
}
