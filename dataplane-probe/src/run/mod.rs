//! The client: sends, receives, and makes the report.
//!
//! Two threads carry the packets, one for each direction, so that neither waits for the other; one more has the long
//! stream and the new connections. [`Probe::start`] returns when the measurement has begun, [`Probe::finish`] ends it.
//!
//! ```no_run
//! use dataplane_probe::run::{Config, Probe};
//!
//! let probe = Probe::start(Config::new("10.128.1.10:7000".parse()?))?;
//! // … migrate …
//! let outcome = probe.finish();
//! println!("{} lost on the way to the VM", outcome.report.to_vm.lost);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod assemble;
mod callee;
mod config;
pub(crate) mod connections;
mod control;
mod events;
mod histograms;
mod reach;
mod receive;
mod send;
mod stream;

use std::io;
use std::net::{IpAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::clock::{MILLISECOND, monotonic_ns, nanos, realtime_ns, realtime_offset_ns};
use crate::control::{Finished, Request};
use crate::pace::Schedule;
use crate::packets::PacketLog;
use crate::sys;
pub use callee::Callee;
use callee::{Callers, Heard};
pub use config::{Config, Error, MAX_RATE_HZ};
use control::{Control, Failure};
use events::Events;
pub use histograms::Histograms;
use receive::Receiving;
use send::{Sending, Sent};

/// Room for what comes in while the receiving thread waits for a processor.
const RECEIVE_BUFFER: u32 = 8 << 20;
/// How often the receiving thread looks whether it should end.
const RECEIVE_TIMEOUT: Duration = Duration::from_millis(100);
/// Between two greetings over UDP.
const HELLO_EVERY: Duration = Duration::from_millis(50);
/// Time for the threads to get ready before the first packet is due.
const RUN_UP_NS: u64 = 5 * MILLISECOND;
/// At least so long is waited for late duplicates after the last packet.
const SETTLE: Duration = Duration::from_millis(250);
/// A wall clock that moved by more than this over the run was set, not disciplined.
const CLOCK_STEP_NS: u64 = MILLISECOND;

/// Figures of a run in progress.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Packets sent to the reflector.
    pub sent: u64,
    /// Packets that it had received, when it last told.
    pub reflector_received: u64,
    /// Packets received from it.
    pub received: u64,
    /// Packets from it that are missing so far, not counting those after the newest.
    pub missing: u64,
    /// Nothing from it for this long.
    pub silent_ns: u64,
}

/// What a run leaves behind.
#[derive(Debug)]
pub struct Outcome {
    /// The report.
    pub report: crate::report::Report,
    /// The distributions behind it.
    pub histograms: Histograms,
    /// Every packet, if [wanted](Config::log) and the reflector could be asked for its part.
    pub packets: Option<PacketLog>,
    /// What went wrong without touching the figures, as with the file of events.
    pub warnings: Vec<String>,
}

/// A measurement in progress. Dropping it ends it without a report.
#[derive(Debug)]
pub struct Probe {
    config: Config,
    control: Control,
    schedule_start: StartTimes,
    sending: Sending,
    receiving: Receiving,
    tcp: Option<TcpThread>,
    callers: Option<Arc<Mutex<Callers>>>,
    events: Events,
}

/// When it all began.
#[derive(Debug, Clone, Copy)]
struct StartTimes {
    /// The first packet was due, wall clock.
    started_ns: u64,
    /// Wall clock less monotonic clock.
    offset_ns: i64,
}

#[derive(Debug)]
struct TcpThread {
    stop: tokio::sync::watch::Sender<bool>,
    /// Where the reflector calls, it is answered until it has been told to stop.
    hang_up: tokio::sync::watch::Sender<bool>,
    thread: Option<JoinHandle<TcpOutcome>>,
}

#[derive(Debug, Default)]
struct TcpOutcome {
    stream: Option<stream::Outcome>,
    connections: Option<connections::Outcome>,
}

/// What the end of a run brought together.
struct Collected {
    config: Config,
    session: u64,
    start: StartTimes,
    sent: Sent,
    received: receive::State,
    account: Result<Account, Failure>,
    tcp: TcpOutcome,
    callers: Vec<(IpAddr, Heard)>,
    clock_moved_ns: u64,
}

/// What runs once the measurement has begun.
struct Begun {
    start: StartTimes,
    sending: Sending,
    receiving: Receiving,
    tcp: Option<TcpThread>,
    callers: Option<Arc<Mutex<Callers>>>,
    events: Events,
}

/// The reflector's account.
struct Account {
    finished: Finished,
    /// When it was asked for, wall clock: it is as of then or a moment later.
    asked_ns: u64,
}

impl Probe {
    /// Opens a session with the reflector, makes sure that TCP and UDP pass, and begins.
    pub fn start(config: Config) -> Result<Self, Error> {
        config.check()?;
        let begun = Instant::now();
        let deadline = begun + config.reach;
        let session = sys::random().map_err(|source| Error::Local {
            doing: "draw a random session".to_owned(),
            source,
        })?;
        let control = Control::new(config.target, session);
        let period_ns = config.period_ns();
        let open = Request::Open {
            session,
            period_ns,
            packet_bytes: config.packet_bytes,
            log: config.log,
        };
        control
            .until(&open, deadline)
            .map_err(|failure| failure.into_error(config.target, begun))?;
        match Self::begin(&config, &control, deadline, begun) {
            Ok(begun) => Ok(Self {
                config,
                control,
                schedule_start: begun.start,
                sending: begun.sending,
                receiving: begun.receiving,
                tcp: begun.tcp,
                callers: begun.callers,
                events: begun.events,
            }),
            Err(error) => {
                // The reflector forgets it anyway, in its own time.
                let _ = control.once(&Request::Close { session });
                Err(error)
            }
        }
    }

    /// The session, by which the reflector logs.
    pub fn session(&self) -> u64 {
        self.control.session()
    }

    /// When the first packet was due, wall clock.
    pub fn started_ns(&self) -> u64 {
        self.schedule_start.started_ns
    }

    /// How it goes.
    pub fn progress(&self) -> Progress {
        let received = self.receiving.state();
        Progress {
            sent: self.sending.sent(),
            reflector_received: received.reflector_received(),
            received: received.ledger.received(),
            missing: received
                .ledger
                .highest()
                .map_or(0, |highest| highest + 1 - received.ledger.received()),
            silent_ns: received
                .arrivals
                .last_ns()
                .map_or(0, |last| realtime_ns().saturating_sub(last)),
        }
    }

    /// Whether the duration is over. Never, if there is none.
    pub fn is_over(&self) -> bool {
        self.sending.is_over()
    }

    /// Ends the measurement: stops both senders, waits for what is still on its way, collects the reflector's account.
    ///
    /// Takes at least a quarter of a second, usually not much more; [`Config::account_timeout`] and a few seconds when the
    /// reflector cannot be reached.
    pub fn finish(mut self) -> Outcome {
        let sent = self.sending.stop();
        if let Some(tcp) = &self.tcp {
            tcp.stop.send_replace(true);
        }
        let account = self.drain(sent.count);
        let tcp = self.tcp.take().map(TcpThread::join).unwrap_or_default();
        let received = self.receiving.stop();
        // The stream ended after the account was asked for, so its last word on retransmissions is newer.
        let account = account.map(|account| self.with_last_retransmits(account, sent.count));
        let packets = self.packets(&sent, &received);
        let _ = self.control.once(&Request::Close {
            session: self.control.session(),
        });
        let clock_moved_ns = realtime_offset_ns().abs_diff(self.schedule_start.offset_ns);
        let events = std::mem::take(&mut self.events);
        let (report, histograms) = assemble::assemble(
            Collected {
                config: self.config.clone(),
                session: self.control.session(),
                start: self.schedule_start,
                sent,
                received,
                account,
                tcp,
                callers: self
                    .callers
                    .as_ref()
                    .map(|callers| callee::lock(callers).seen())
                    .unwrap_or_default(),
                clock_moved_ns,
            },
            &events,
        );
        let (packets, complaint) = packets.map_or_else(
            |complaint| (None, Some(complaint)),
            |packets| (packets, None),
        );
        let warnings = events.close().err().into_iter().chain(complaint).collect();
        Outcome {
            report,
            histograms,
            packets,
            warnings,
        }
    }

    /// The log of every packet, if it is wanted; an error is what to say where the reflector does not tell its part.
    fn packets(&self, sent: &Sent, received: &receive::State) -> Result<Option<PacketLog>, String> {
        let (Some(sent), Some(heard)) = (&sent.log, &received.log) else {
            return Ok(None);
        };
        let deadline = Instant::now() + self.config.account_timeout;
        let remote = self.control.log(deadline).map_err(|failure| {
            let target = self.config.target;
            format!("there is no log of the packets: the reflector at {target} could not be asked: {failure}")
        })?;
        let period_ns = self.config.period_ns();
        Ok(Some(PacketLog::assemble(sent, heard, &remote, period_ns)))
    }

    fn begin(
        config: &Config,
        control: &Control,
        deadline: Instant,
        begun: Instant,
    ) -> Result<Begun, Error> {
        let target = config.target;
        let (link, stream) = match &config.called_at {
            None => reach::reach(config, control, deadline, begun)?,
            Some(callee) => reach::be_called(config, callee, control, deadline, begun)?,
        };
        let events = match &config.events {
            Some(path) => Events::to_file(path).map_err(|source| Error::Local {
                doing: format!("write events to {}", path.display()),
                source,
            })?,
            None => Events::default(),
        };
        let link = Arc::new(link);
        let session = control.session();
        let receiving = Receiving::start(config, session, Arc::clone(&link), events.sink())
            .map_err(local("start a thread"))?;
        control
            .until(&Request::Start { session }, deadline)
            .map_err(|failure| failure.into_error(target, begun))?;
        let offset_ns = realtime_offset_ns();
        let start_ns = monotonic_ns() + RUN_UP_NS;
        let started_ns = start_ns.saturating_add_signed(offset_ns);
        receiving.expect_to_vm(started_ns);
        let schedule = Schedule::new(start_ns, config.period_ns());
        let callers = link.callers.clone();
        let sending = Sending::start(config, session, link, schedule, started_ns, events.sink())
            .map_err(local("start a thread"))?;
        let start = StartTimes {
            started_ns,
            offset_ns,
        };
        let tcp = TcpThread::start(config, session, stream, start, callers.clone(), &events)
            .map_err(local("start a thread"))?;
        Ok(Begun {
            start,
            sending,
            receiving,
            tcp,
            callers,
            events,
        })
    }

    /// Waits until everything that was sent has arrived, or for as long as it is to be waited.
    fn drain(&self, to_vm_sent: u64) -> Result<Account, Failure> {
        let begun = Instant::now();
        let request = Request::Finish {
            session: self.control.session(),
            to_vm_sent,
        };
        loop {
            let asked_ns = realtime_ns();
            let finished = self.control.finished(
                &request,
                begun + self.config.account_timeout.max(self.config.drain),
            )?;
            self.receiving.expect_from_vm(asked_ns);
            let waited = begun.elapsed();
            let open = finished
                .connections
                .as_ref()
                .map_or(0, |attempts| attempts.pending);
            let complete = finished.to_vm.lost == 0 && open == 0 && {
                let state = self.receiving.state();
                state.ledger.received() >= finished.from_vm_sent
            };
            if waited >= self.config.drain || (complete && waited >= SETTLE) {
                return Ok(Account { finished, asked_ns });
            }
            thread::sleep(
                SETTLE
                    .min(self.config.drain.saturating_sub(waited))
                    .min(Duration::from_millis(100)),
            );
        }
    }

    fn with_last_retransmits(&self, mut account: Account, to_vm_sent: u64) -> Account {
        let request = Request::Finish {
            session: self.control.session(),
            to_vm_sent,
        };
        if self.config.stream_every.is_some()
            && let Ok(last) = self.control.finished(&request, Instant::now())
        {
            account.finished.stream_retransmits = last.stream_retransmits;
        }
        account
    }
}

impl TcpThread {
    fn start(
        config: &Config,
        session: u64,
        stream: Option<TcpStream>,
        start: StartTimes,
        callers: Option<Arc<Mutex<Callers>>>,
        events: &Events,
    ) -> io::Result<Option<Self>> {
        if stream.is_none() && config.connect_every.is_none() {
            return Ok(None);
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let (hang_up, over) = tokio::sync::watch::channel(false);
        let clock = start.clock();
        let stream = stream.zip(config.stream_every).map(|(socket, every)| {
            stream::run(
                socket,
                every,
                config.drain,
                clock,
                stopped.clone(),
                events.sink(),
            )
        });
        let listener = match &config.called_at {
            Some(callee) => Some(callee.listener()?),
            None => None,
        };
        let answering = listener
            .zip(callers)
            .map(|(listener, callers)| callee::answer(listener, session, callers, over));
        let ours = config.connect_every.filter(|_| config.called_at.is_none());
        let connections = ours.map(|every| {
            connections::run(
                config.target,
                session,
                every,
                config.connect_timeout,
                clock,
                stopped,
                events.sink(),
            )
        });
        let realtime = config.realtime;
        let all = async move {
            let (stream, connections, _) =
                tokio::join!(maybe(stream), maybe(connections), maybe(answering));
            TcpOutcome {
                stream,
                connections,
            }
        };
        let thread = thread::Builder::new()
            .name("probe-tcp".into())
            .spawn(move || {
                if realtime {
                    sys::prefer_this_thread(sys::STREAMS);
                }
                runtime.block_on(all)
            })?;
        Ok(Some(Self {
            stop,
            hang_up,
            thread: Some(thread),
        }))
    }

    fn join(mut self) -> TcpOutcome {
        self.stop.send_replace(true);
        self.hang_up.send_replace(true);
        self.thread
            .take()
            .and_then(|thread| thread.join().ok())
            .unwrap_or_default()
    }
}

/// The time at which things on the TCP side are due, in tokio's terms and on the wall clock.
#[derive(Debug, Clone, Copy)]
struct Clock {
    begin: tokio::time::Instant,
    begin_ns: u64,
}

impl Clock {
    fn due(&self, number: u64, every: Duration) -> tokio::time::Instant {
        self.begin + Duration::from_nanos(nanos(every).saturating_mul(number))
    }

    fn due_ns(&self, number: u64, every: Duration) -> u64 {
        self.begin_ns
            .saturating_add(nanos(every).saturating_mul(number))
    }
}

impl StartTimes {
    fn clock(self) -> Clock {
        let start_ns = self.started_ns.saturating_add_signed(-self.offset_ns);
        let ahead = Duration::from_nanos(start_ns.saturating_sub(monotonic_ns()));
        Clock {
            begin: tokio::time::Instant::now() + ahead,
            begin_ns: self.started_ns,
        }
    }
}

/// A flag that a thread looks at.
type Flag = Arc<AtomicBool>;

fn raised(flag: &Flag) -> bool {
    flag.load(Ordering::Relaxed)
}

async fn maybe<F: Future>(future: Option<F>) -> Option<F::Output> {
    match future {
        Some(future) => Some(future.await),
        None => None,
    }
}

fn local(doing: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Local {
        doing: doing.to_owned(),
        source,
    }
}
