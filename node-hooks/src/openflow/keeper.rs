//! A connection to a switch that is kept.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};

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
/// How often, where a port is to be open: its guest may be without network for as long.
const LOOK_OPEN: Duration = Duration::from_millis(100);
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
    known: Mutex<Known>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Known {
    blocks: BTreeMap<u16, Vec<Block>>,
    /// Those that are to be open by now.
    open: BTreeSet<u16>,
    /// How often ports were opened: what was asked before an opening says nothing of after it.
    openings: u64,
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
    /// Begins to connect to a bridge's management socket. `blocked` is told of ports that are to be open and are not, as
    /// often as that is found.
    pub fn start(socket: PathBuf, blocked: impl Fn(BTreeSet<u16>) + Send + 'static) -> Self {
        let connect = move || {
            let socket = socket.clone();
            async move { Switch::connect(&socket).await }
        };
        Self::connecting(connect, blocked)
    }

    fn connecting<C, F>(connect: C, blocked: impl Fn(BTreeSet<u16>) + Send + 'static) -> Self
    where
        C: Fn() -> F + Send + Sync + 'static,
        F: Future<Output = Result<Switch, Error>> + Send + 'static,
    {
        let state = Arc::new(watch::Sender::new(State::Cold { last_error: None }));
        let shut = Arc::new(Shut::default());
        let tasks = [
            tokio::spawn(keep(connect, state.clone())).abort_handle(),
            tokio::spawn(look(state.subscribe(), shut.clone(), blocked)).abort_handle(),
        ];
        Self { state, shut, tasks }
    }

    /// Has it find out, now and again and again, what shuts these ports, and forget about others: [`blocks`](Self::blocks)
    /// tells.
    pub fn expect_to_open(&self, ports: BTreeSet<u16>) {
        let mut known = self.shut.lock();
        known.blocks.retain(|port, _| ports.contains(port));
        for port in ports {
            known.blocks.entry(port).or_default();
        }
        drop(known);
        self.shut.changed.notify_one();
    }

    /// Has it look more often at these ports, of those that it knows of, and tell when something shuts them.
    pub fn expect_open(&self, ports: BTreeSet<u16>) {
        self.shut.lock().open = ports;
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

    /// Like [`blocks`](Self::blocks), of ports that are opened now: nothing is told of what is found in the switch as it
    /// was before.
    pub fn blocks_to_remove(&self, packets: &PacketOuts) -> Option<Vec<Block>> {
        self.shut.lock().openings += 1;
        self.blocks(packets)
    }

    /// What shuts the ports that these frames come in by. None unless it is known of each of them, in both directions.
    pub fn blocks(&self, packets: &PacketOuts) -> Option<Vec<Block>> {
        let known = self.shut.lock();
        let mut blocks = Vec::new();
        for port in packets.ports() {
            let own = known.blocks.get(&port)?;
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

/// Finds out what shuts the ports that are to be opened, and tells of it where they are to be open already.
async fn look(
    mut state: watch::Receiver<State>,
    shut: Arc<Shut>,
    blocked: impl Fn(BTreeSet<u16>) + Send,
) {
    // Each error once.
    let mut told = None;
    // When all of them are looked at again.
    let mut all_at = Instant::now();
    loop {
        let is_all = all_at <= Instant::now();
        let ports = shut.ports(is_all);
        let switch = match &*state.borrow_and_update() {
            State::Warm(switch) if !ports.is_empty() => Some(switch.clone()),
            _ => None,
        };
        let mut next = (!is_all).then_some(all_at);
        if let Some(switch) = switch {
            if is_all {
                all_at = Instant::now() + LOOK;
            }
            let found = shut.look_at(ports, &switch, &mut told).await;
            if !found.is_empty() {
                blocked(found);
            }
            next = Some(Instant::now() + shut.pause());
        }
        tokio::select! {
            () = shut.changed.notified() => all_at = Instant::now(),
            changed = state.changed() => match changed {
                Ok(()) => all_at = Instant::now(),
                Err(_) => return,
            },
            () = sleep_until(next.unwrap_or(all_at)), if next.is_some() => {}
        }
    }
}

impl Shut {
    /// The ports that are looked at next: all, or those that are to be open.
    fn ports(&self, all: bool) -> Vec<u16> {
        let known = self.lock();
        let ports = known.blocks.keys().copied();
        ports
            .filter(|port| all || known.open.contains(port))
            .collect()
    }

    /// Until the next look.
    fn pause(&self) -> Duration {
        let known = self.lock();
        if known.open.is_empty() {
            LOOK
        } else {
            LOOK_OPEN
        }
    }

    /// Asks the switch what shuts these ports; those that are to be open and are not.
    async fn look_at(
        &self,
        ports: Vec<u16>,
        switch: &Switch,
        told: &mut Option<String>,
    ) -> BTreeSet<u16> {
        let mut blocked = BTreeSet::new();
        for port in ports {
            let openings = self.lock().openings;
            // What was known stays known where nothing is told: it is removed only if it is still there.
            match timeout(ANSWER, switch.blocks(port)).await {
                Ok(Ok(blocks)) => {
                    let mut known = self.lock();
                    let is_blocked = !blocks.is_empty() && known.open.contains(&port);
                    if is_blocked && known.openings == openings {
                        blocked.insert(port);
                    }
                    if let Some(known) = known.blocks.get_mut(&port) {
                        *known = blocks;
                    }
                }
                Ok(Err(error)) => {
                    let text = arp_proxy::chain(&error);
                    if told.as_ref() != Some(&text) {
                        tracing::warn!(port, error = text, "what shuts a port is not known");
                        *told = Some(text);
                    }
                }
                Err(_) => {}
            }
        }
        blocked
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        // Nothing panics halfway through a change.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
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
