//! Which interfaces are wanted.

use std::collections::BTreeSet;

use glob::Pattern;

/// Shell patterns, of which one is to match: `*` is any text, `?` any character, `[ab]` one of these.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Patterns(Vec<Pattern>);

impl Patterns {
    /// Whether one matches.
    pub fn include(&self, name: &str) -> bool {
        self.0.iter().any(|pattern| pattern.matches(name))
    }

    /// Whether there is none, so that nothing matches.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<Pattern> for Patterns {
    fn from_iter<I: IntoIterator<Item = Pattern>>(patterns: I) -> Self {
        Self(patterns.into_iter().collect())
    }
}

/// By name, or because Open vSwitch says so.
#[derive(Clone, Debug, Default)]
pub(crate) struct Selection {
    pub(crate) names: Patterns,
    pub(crate) from_ovs: BTreeSet<String>,
}

impl Selection {
    pub(crate) fn includes(&self, name: &str) -> bool {
        self.names.include(name) || self.from_ovs.contains(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patterns(patterns: &[&str]) -> Patterns {
        let patterns = patterns.iter().map(|text| Pattern::new(text).unwrap());
        patterns.collect()
    }

    #[test]
    fn shell_patterns() {
        let taps = patterns(&["tap*", "veth?"]);
        assert!(taps.include("tap0") && taps.include("veth1"));
        assert!(!taps.include("xtap0") && !taps.include("veth10"));
        assert!(!patterns(&[]).include("tap0"));
        // Kubernetes' names of ports may have a namespace in front.
        assert!(patterns(&["prod*"]).include("prod/vm-1"));
    }

    #[test]
    fn either_reason_is_enough() {
        let selection = Selection {
            names: patterns(&["tap*"]),
            from_ovs: BTreeSet::from(["veth1234".to_owned()]),
        };
        assert!(selection.includes("tap0") && selection.includes("veth1234"));
        assert!(!selection.includes("eth0"));
    }
}
