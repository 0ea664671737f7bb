//! What was seen of one handover: told once, kept for a controller that comes later.

use std::collections::{BTreeSet, VecDeque};

use node_hooks_api::agent::Signal;
use node_hooks_api::agent::signal::{Kind, Source};

use crate::time::Nanos;

/// How many signals of a handover are kept. Two pauses and resumes by every source, and the first or
/// last frames of a dozen ports, are fewer.
const KEPT: usize = 64;

/// What was seen of the guest of one handover on this node.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// The sources that said each.
    paused: BTreeSet<Source>,
    resumed: BTreeSet<Source>,
    left: BTreeSet<Source>,
    history: VecDeque<Signal>,
    /// When the guest paused or resumed last, by the newest stamp.
    turned: Nanos,
}

impl Seen {
    /// Whether this is news: a source tells of each pause, resume and end once. A resume makes a
    /// later pause news again, and the reverse, since a migration may be tried more than once before
    /// it is given up. What one source tells late, after another told that the guest has turned
    /// since, is none.
    pub(super) fn is_news(&mut self, kind: Kind, source: Source, at: Nanos) -> bool {
        let turns = match kind {
            Kind::Paused => self.is_resumed(),
            Kind::Resumed => self.is_paused(),
            _ => false,
        };
        if turns && at < self.turned {
            return false;
        }
        match kind {
            Kind::Paused => {
                self.turned = self.turned.max(at);
                self.resumed.clear();
                self.paused.insert(source)
            }
            Kind::Resumed => {
                self.turned = self.turned.max(at);
                self.paused.clear();
                self.resumed.insert(source)
            }
            Kind::Left => self.left.insert(source),
            Kind::Unspecified | Kind::LastFrame | Kind::FirstFrame => true,
        }
    }

    /// Whether the guest is paused as far as any source said.
    pub(super) fn is_paused(&self) -> bool {
        !self.paused.is_empty()
    }

    /// Whether the guest runs again as far as any source said.
    pub(super) fn is_resumed(&self) -> bool {
        !self.resumed.is_empty()
    }

    /// Whether any source said anything of where the guest is.
    pub(super) fn is_any(&self) -> bool {
        self.is_paused() || self.is_resumed() || self.has_left()
    }

    /// Whether the guest has left for good, as far as any source said.
    pub(super) fn has_left(&self) -> bool {
        !self.left.is_empty()
    }

    pub(super) fn keep(&mut self, signal: Signal) {
        if self.history.len() == KEPT {
            self.history.pop_front();
        }
        self.history.push_back(signal);
    }

    /// Everything that is kept, in the order in which it was seen.
    pub(super) fn history(&self) -> impl Iterator<Item = &Signal> {
        self.history.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_tells_once_and_every_source_is_heard() {
        let mut seen = Seen::default();
        assert!(seen.is_news(Kind::Resumed, Source::Rarp, Nanos(1)));
        assert!(!seen.is_news(Kind::Resumed, Source::Rarp, Nanos(1)));
        assert!(seen.is_news(Kind::Resumed, Source::Libvirt, Nanos(1)));
        assert!(seen.is_news(Kind::Left, Source::Libvirt, Nanos(1)));
        assert!(!seen.is_news(Kind::Left, Source::Libvirt, Nanos(1)));
    }

    #[test]
    fn no_source_tells_twice_however_many_there_are() {
        let sources: Vec<_> = (0..=i32::from(u8::MAX))
            .filter_map(|number| Source::try_from(number).ok())
            .collect();
        assert!(sources.contains(&Source::Frame), "{sources:?}");
        for kind in [Kind::Paused, Kind::Resumed, Kind::Left] {
            let mut seen = Seen::default();
            for &source in &sources {
                assert!(seen.is_news(kind, source, Nanos(1)), "{kind:?} {source:?}");
                assert!(!seen.is_news(kind, source, Nanos(1)), "{kind:?} {source:?}");
            }
        }
    }

    #[test]
    fn a_second_pause_is_news_after_a_resume() {
        let mut seen = Seen::default();
        assert!(seen.is_news(Kind::Paused, Source::Libvirt, Nanos(1)) && seen.is_paused());
        assert!(!seen.is_news(Kind::Paused, Source::Libvirt, Nanos(1)));
        assert!(seen.is_news(Kind::Resumed, Source::Libvirt, Nanos(1)) && !seen.is_paused());
        assert!(seen.is_news(Kind::Paused, Source::Libvirt, Nanos(1)) && seen.is_paused());
    }

    #[test]
    fn what_a_source_tells_late_is_no_turn() {
        let mut seen = Seen::default();
        assert!(seen.is_news(Kind::Paused, Source::Qmp, Nanos(10)));
        assert!(seen.is_news(Kind::Resumed, Source::Qmp, Nanos(30)));
        assert!(!seen.is_news(Kind::Paused, Source::Libvirt, Nanos(11)));
        assert!(seen.is_resumed() && !seen.is_paused());
        assert!(
            seen.is_news(Kind::Resumed, Source::Libvirt, Nanos(31)),
            "it confirms"
        );
        assert!(seen.is_news(Kind::Paused, Source::Qmp, Nanos(50)));
        assert!(!seen.is_news(Kind::Resumed, Source::Libvirt, Nanos(32)));
        assert!(seen.is_paused());
        assert!(
            seen.is_news(Kind::Paused, Source::Libvirt, Nanos(49)),
            "likewise"
        );
    }

    #[test]
    fn what_is_kept_is_bounded_and_the_newest() {
        let mut seen = Seen::default();
        for at_ns in 0..1000 {
            seen.keep(Signal {
                at_ns,
                ..Signal::default()
            });
        }
        let kept: Vec<u64> = seen.history().map(|signal| signal.at_ns).collect();
        assert_eq!(kept.len(), KEPT);
        assert_eq!(kept.last(), Some(&999));
    }
}
