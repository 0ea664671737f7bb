//! A connection to a switch that is kept.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout};

use super::Error;
use super::blocks::Block;
use super::packets::PacketOuts;
use super::switch::{Sent, Switch};

/// Pauses between attempts to connect.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// How often it is looked what shuts the ports that are to be opened. OVN installs it when the target's port appears, and
/// a copy takes seconds.
const LOOK: Duration = Duration::from_millis(500);
/// How long the switch may take to tell.
const ANSWER: Duration = Duration::from_secs(2);

/// Keeps a connection to a switch, from when it is made until it is dropped, across whatever ends one.
///
/// # Guarantees
/// - [`send`](Self::send) writes at once or fails at once.
/// - A switch that is away is tried again with growing pauses.
#[derive(Debug)]
pub struct Keeper {
    state: Arc<watch::Sender<State>>,
    shut: Arc<Shut>,
    tasks: [AbortHandle; 2],
}

/// The ports that are to be opened, and what shuts them, as far as is known.
#[derive(Debug, Default)]
struct Shut {
    ports: Mutex<BTreeMap<u16, Vec<Block>>>,
    changed: Notify,
}

/// How it stands with the connection.
#[derive(Clone, Debug)]
pub enum State {
    /// There is none.
    Cold {
        /// What ended the last one, or the last attempt; none before the first.
        last_error: Option<Arc<Error>>,
    },
    /// There is one.
    Warm(Switch),
}

impl Keeper {
    /// Begins to connect to a bridge's management socket.
    pub fn start(socket: PathBuf) -> Self {
        Self::connecting(move || {
            let socket = socket.clone();
            async move { Switch::connect(&socket).await }
        })
    }

    fn connecting<C, F>(connect: C) -> Self
    where
        C: Fn() -> F + Send + Sync + 'static,
        F: Future<Output = Result<Switch, Error>> + Send + 'static,
    {
        let state = Arc::new(watch::Sender::new(State::Cold { last_error: None }));
        let shut = Arc::new(Shut::default());
        let tasks = [
            tokio::spawn(keep(connect, state.clone())).abort_handle(),
            tokio::spawn(look(state.subscribe(), shut.clone())).abort_handle(),
        ];
        Self { state, shut, tasks }
    }

    /// Has it find out, now and again and again, what shuts these ports, and forget about others: [`blocks`](Self::blocks)
    /// tells.
    pub fn expect_to_open(&self, ports: BTreeSet<u16>) {
        let mut known = self.shut.lock();
        known.retain(|port, _| ports.contains(port));
        for port in ports {
            known.entry(port).or_default();
        }
        drop(known);
        self.shut.changed.notify_one();
    }

    /// How it stands, now and later.
    pub fn state(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    /// Sends frames and a barrier behind them, now.
    ///
    /// # Errors
    /// [`Error::Cold`] if there is no connection, and like [`Switch::send`].
    pub fn send(&self, packets: &PacketOuts) -> Result<Sent, Error> {
        self.switch()?.send(packets)
    }

    /// The connection, if there is one at this moment.
    ///
    /// # Errors
    /// [`Error::Cold`] if there is none.
    pub fn switch(&self) -> Result<Switch, Error> {
        match &*self.state.borrow() {
            State::Warm(switch) => Ok(switch.clone()),
            State::Cold { last_error } => Err(Error::Cold(last_error.clone())),
        }
    }

    /// What shuts the ports that these frames come in by. None unless it is known of each of them, in both directions.
    pub fn blocks(&self, packets: &PacketOuts) -> Option<Vec<Block>> {
        let known = self.shut.lock();
        let mut blocks = Vec::new();
        for port in packets.ports() {
            let own = known.get(&port)?;
            let [inward, outward] =
                [true, false].map(|way| own.iter().any(|it| it.is_inward() == way));
            if !(inward && outward) {
                return None;
            }
            blocks.extend_from_slice(own);
        }
        Some(blocks)
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
        // Who still looks is not to hold the connection.
        self.state.send_replace(State::Cold { last_error: None });
    }
}

async fn keep<C, F>(connect: C, state: Arc<watch::Sender<State>>)
where
    C: Fn() -> F,
    F: Future<Output = Result<Switch, Error>>,
{
    let mut pauses = pauses();
    // What is said once need not be said at every attempt.
    let mut told = None;
    loop {
        let began = Instant::now();
        let error = match connect().await {
            Ok(switch) => {
                tracing::info!(version = %switch.version(), "connected to the switch");
                told = None;
                state.send_replace(State::Warm(switch.clone()));
                let error = switch.ended().await;
                if began.elapsed() > LONGEST_PAUSE {
                    pauses = self::pauses();
                }
                error
            }
            Err(error) => error,
        };
        let text = arp_proxy::chain(&error);
        if told.as_ref() != Some(&text) {
            tracing::warn!(error = text, "not connected to the switch; trying again");
            told = Some(text);
        }
        state.send_replace(State::Cold {
            last_error: Some(Arc::new(error)),
        });
        sleep(pauses.next().unwrap_or(LONGEST_PAUSE)).await;
    }
}

/// Finds out what shuts the ports that are to be opened.
async fn look(mut state: watch::Receiver<State>, shut: Arc<Shut>) {
    // Each error once.
    let mut told = None;
    loop {
        let ports: Vec<_> = shut.lock().keys().copied().collect();
        let switch = match &*state.borrow_and_update() {
            State::Warm(switch) if !ports.is_empty() => Some(switch.clone()),
            _ => None,
        };
        let Some(switch) = switch else {
            tokio::select! {
                () = shut.changed.notified() => {}
                changed = state.changed() => if changed.is_err() { return },
            }
            continue;
        };
        for port in ports {
            // What was known stays known where nothing is told: it is removed only if it is still there.
            match timeout(ANSWER, switch.blocks(port)).await {
                Ok(Ok(blocks)) => {
                    if let Some(known) = shut.lock().get_mut(&port) {
                        *known = blocks;
                    }
                }
                Ok(Err(error)) => {
                    let text = arp_proxy::chain(&error);
                    if told.as_ref() != Some(&text) {
                        tracing::warn!(port, error = text, "what shuts a port is not known");
                        told = Some(text);
                    }
                }
                Err(_) => {}
            }
        }
        tokio::select! {
            () = shut.changed.notified() => {}
            () = sleep(LOOK) => {}
        }
    }
}

impl Shut {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u16, Vec<Block>>> {
        // Nothing panics halfway through a change.
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn pauses() -> impl Iterator<Item = Duration> + Send {
    ExponentialBuilder::default()
        .with_min_delay(FIRST_PAUSE)
        .with_max_delay(LONGEST_PAUSE)
        .with_jitter()
        .without_max_times()
        .build()
}

#[cfg(test)]
#[path = "keeper_tests.rs"]
mod tests;
