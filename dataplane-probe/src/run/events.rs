//! Every event as a line of JSON, written by a thread of its own so that no packet waits for a disk.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};

use serde::Serialize;

/// One line.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(super) enum Event {
    /// `to_vm`: a packet was sent, `late_us` after `due_ns`.
    Sent { seq: u64, due_ns: u64, late_us: u32 },
    /// `from_vm`: a packet arrived; and how many packets the reflector had received when it sent it.
    Received {
        seq: u64,
        at_ns: u64,
        late_us: u32,
        duplicate: bool,
        to_vm_received: u64,
        to_vm_highest: u64,
    },
    /// A run of losses, known at the end.
    Lost {
        direction: &'static str,
        first: u64,
        count: u64,
        start_ns: Option<u64>,
        end_ns: Option<u64>,
    },
    /// The stream brought something back.
    Echo { at_ns: u64, bytes: usize },
    /// A new connection was due, and how it went.
    Connection {
        due_ns: u64,
        took_us: u64,
        error: Option<String>,
    },
}

/// The file, if there is one.
#[derive(Debug, Default)]
pub(super) struct Events {
    open: Option<(Sender<Event>, JoinHandle<io::Result<()>>, String)>,
}

/// Where a thread puts its events.
#[derive(Debug, Clone)]
pub(super) struct Sink(Option<Sender<Event>>);

impl Events {
    pub(super) fn to_file(path: &Path) -> io::Result<Self> {
        let file = File::create(path)?;
        let (sender, receiver) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("probe-events".into())
            .spawn(move || write(&receiver, file))?;
        Ok(Self {
            open: Some((sender, thread, path.display().to_string())),
        })
    }

    pub(super) fn sink(&self) -> Sink {
        Sink(self.open.as_ref().map(|(sender, ..)| sender.clone()))
    }

    /// Writes what is left. All sinks must be gone.
    pub(super) fn close(self) -> Result<(), String> {
        let Some((sender, thread, path)) = self.open else {
            return Ok(());
        };
        drop(sender);
        match thread.join() {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(format!("the file of events {path} is incomplete: {error}")),
            Err(_) => Err(format!(
                "the file of events {path} is incomplete: its thread died"
            )),
        }
    }
}

impl Sink {
    /// The event is only made if somebody wants it.
    pub(super) fn send(&self, event: impl FnOnce() -> Event) {
        if let Some(sender) = &self.0 {
            // Fails when the writer gave up, of which the end of the run tells.
            let _ = sender.send(event());
        }
    }
}

fn write(events: &Receiver<Event>, file: File) -> io::Result<()> {
    let mut file = BufWriter::with_capacity(1 << 18, file);
    for event in events {
        serde_json::to_writer(&mut file, &event)?;
        file.write_all(b"\n")?;
    }
    file.flush()
}
