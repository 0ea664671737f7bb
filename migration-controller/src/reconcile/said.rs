//! What has been said already, where the same would be said at every look.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// The last word on each matter.
#[derive(Debug, Default)]
pub(crate) struct Said(Mutex<BTreeMap<String, String>>);

impl Said {
    /// Whether there is something new to say about a matter. With `None` there is nothing any more,
    /// and whatever comes next is new.
    pub(super) fn is_news(&self, matter: &str, word: Option<&str>) -> bool {
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(word) = word else {
            said.remove(matter);
            return false;
        };
        if said.get(matter).is_some_and(|last| last == word) {
            return false;
        }
        said.insert(matter.to_owned(), word.to_owned());
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_news_until_it_is_said_and_again_when_it_had_passed() {
        let said = Said::default();
        assert!(said.is_news("w0", Some("a")));
        assert!(!said.is_news("w0", Some("a")));
        assert!(said.is_news("w1", Some("a")), "another matter");
        assert!(said.is_news("w0", Some("b")));
        assert!(!said.is_news("w0", None));
        assert!(said.is_news("w0", Some("b")));
    }
}
