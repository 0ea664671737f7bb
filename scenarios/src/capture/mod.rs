//! What happened in a migration, recomputed from what `tcpdump` captured and from nothing else.
//!
//! A migration's directory has three files: `client.pcap` from the VM's peer, `source.pcap` and
//! `target.pcap` from the two nodes. The probe's packets carry sequence numbers, and those of the
//! VM how many had reached it, so the three are enough: neither the probe's own account nor the
//! runner's clock is needed. [`Figures::of`] reads them, [`compare`] holds them against the
//! report's, [`render`] shows them.
//!
//! A node's frames to and from the VM pass its tap alone, everything else between hosts is in
//! tunnels. Where a file has all interfaces (`tcpdump -i any`), a frame to the VM counts where it
//! leaves the host and one from the VM where it comes in: on a tap, and on the client, and not at a
//! node's gateway.

mod compare;
mod figures;
mod frame;
mod pcap;
mod table;

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

pub use compare::{Comparison, Reported, compare};
pub use figures::{Direction, Figures, Places, Silence, Span, Stream};
pub use frame::TooShort;
pub use pcap::{Link, Pcap, PcapError, Record};
pub use table::render;

use frame::Frame;

/// The files of one migration's directory.
pub const FILES: [&str; 3] = ["client.pcap", "source.pcap", "target.pcap"];

impl Figures {
    /// Recomputes them from the files of a migration's directory.
    ///
    /// # Errors
    /// When a file is missing, is not a capture, ends within a record or has nothing of the probe in
    /// it; the message names the file and the place.
    pub fn of(dir: &Path) -> Result<Self> {
        let [client, source, target] = FILES.map(|name| frames(&dir.join(name)));
        Self::recompute(&client?, &source?, &target?).with_context(|| dir.display().to_string())
    }
}

fn frames(path: &Path) -> Result<Vec<Frame>> {
    let read = || {
        let file = fs::read(path)?;
        let pcap = Pcap::new(&file)?;
        let link = pcap.link();
        let mut frames = Vec::new();
        for record in pcap {
            frames.extend(Frame::of(link, &record?)?);
        }
        anyhow::Ok(frames)
    };
    read().with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests;
