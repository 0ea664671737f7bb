//! The figures for people.

use comfy_table::{CellAlignment, Table, presets};

use super::{Direction, Figures, Silence, Span, Stream};

/// The figures as text. Times of day are in seconds from the first packet.
pub fn render(figures: &Figures) -> String {
    let parts = [
        packets(figures),
        format!(
            "Longest gap in arrivals from the VM: {}.",
            figures
                .longest_gap
                .map_or_else(|| "nothing arrived".to_owned(), |gap| figures.shown(gap))
        ),
        figures.silence.map_or_else(
            || "The VM's taps show no packet of the probe.".to_owned(),
            |silence| figures.silence_shown(silence),
        ),
        figures.stream.as_ref().map_or_else(
            || "There is no TCP connection.".to_owned(),
            |stream| figures.stream_shown(stream),
        ),
    ];
    parts.join("\n")
}

fn packets(figures: &Figures) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    let every = format!("packets, one every {:.1} ms", figures.period_ms);
    table.set_header([every.as_str(), "towards the VM", "from the VM"]);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let counts = |way: &Direction| {
        let places = way.places;
        [
            ("sent", way.sent),
            ("on the source's tap alone", places.source),
            ("on the target's tap alone", places.target),
            ("on both", places.both),
            ("on neither", places.neither),
            ("received", way.received),
            ("lost", way.lost),
            ("duplicated", way.duplicated),
        ]
    };
    let ways = counts(&figures.to_vm)
        .into_iter()
        .zip(counts(&figures.from_vm));
    for ((what, to_vm), (_, from_vm)) in ways {
        table.add_row([what.to_owned(), to_vm.to_string(), from_vm.to_string()]);
    }
    table.to_string()
}

impl Figures {
    fn shown(&self, span: Span) -> String {
        format!("{:.1} ms at {} s", span.ms, self.seconds(span.start_ns))
    }

    fn silence_shown(&self, silence: Silence) -> String {
        let Silence { span, moved } = silence;
        let (ms, start) = (span.ms, self.seconds(span.start_ns));
        if moved {
            format!(
                "The VM's last packet on the source at {start} s, its next on the target {ms:.1} ms \
                 later."
            )
        } else {
            format!(
                "The VM stayed on the source; its longest silence there: {ms:.1} ms at {start} s."
            )
        }
    }

    fn stream_shown(&self, stream: &Stream) -> String {
        let shown = |stall: Option<Span>| {
            stall.map_or_else(|| "none".to_owned(), |stall| self.shown(stall))
        };
        format!(
            "TCP stream (client's port {}, a record every {:.1} ms), longest stall: {}; around the \
             silence: {}.",
            stream.port,
            stream.period_ms,
            shown(stream.longest_stall),
            shown(stream.stall_around_silence),
        )
    }

    /// A time, from the first packet.
    fn seconds(&self, at_ns: u64) -> String {
        let (sign, nanos) = match at_ns.checked_sub(self.started_ns) {
            Some(after) => ("+", after),
            None => ("-", self.started_ns - at_ns),
        };
        let millis = nanos / 1_000_000;
        format!("{sign}{}.{:03}", millis / 1_000, millis % 1_000)
    }
}
