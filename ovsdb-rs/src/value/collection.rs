//! Sets and maps of atoms, as sorted slices.
//!
//! A scalar is a set of one, so most of a replica's memory is small collections: a slice has no
//! overhead per collection, where a tree has a node of a dozen atoms.

use super::Atom;

/// Distinct atoms, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(transparent)]
pub struct AtomSet(Box<[Atom]>);

/// Pairs with distinct keys, in the keys' order.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(transparent)]
pub struct AtomMap(Box<[(Atom, Atom)]>);

impl AtomSet {
    /// The atoms in their order.
    pub fn iter(&self) -> std::slice::Iter<'_, Atom> {
        self.0.iter()
    }

    /// How many atoms there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether `atom` is one of them.
    pub fn contains(&self, atom: &Atom) -> bool {
        self.0.binary_search(atom).is_ok()
    }

    /// What only one of the two has.
    pub(crate) fn symmetric_difference(self, other: Self) -> Self {
        let mut atoms: Vec<Atom> = Vec::with_capacity(self.len() + other.len());
        for atom in merge(self.0, other.0, Atom::cmp) {
            if atoms.last() == Some(&atom) {
                atoms.pop();
            } else {
                atoms.push(atom);
            }
        }
        Self(atoms.into())
    }
}

impl AtomMap {
    /// The pairs in the order of their keys.
    pub fn iter(&self) -> std::slice::Iter<'_, (Atom, Atom)> {
        self.0.iter()
    }

    /// How many pairs there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The value under `key`.
    pub fn get(&self, key: &Atom) -> Option<&Atom> {
        let found = self.0.binary_search_by(|(own, _)| own.cmp(key)).ok()?;
        Some(&self.0[found].1)
    }

    /// The pairs of `difference` put in place of those with the same keys, less those that both have.
    pub(crate) fn patched(self, difference: Self) -> Self {
        let mut pairs: Vec<(Atom, Atom)> = Vec::with_capacity(self.len() + difference.len());
        for pair in merge(self.0, difference.0, |a, b| a.0.cmp(&b.0)) {
            match pairs.last_mut() {
                Some(last) if *last == pair => {
                    pairs.pop();
                }
                Some(last) if last.0 == pair.0 => *last = pair,
                _ => pairs.push(pair),
            }
        }
        Self(pairs.into())
    }
}

/// Both, in order; of equals, those of `first` first.
fn merge<T>(
    first: Box<[T]>,
    second: Box<[T]>,
    order: impl Fn(&T, &T) -> std::cmp::Ordering,
) -> impl Iterator<Item = T> {
    let (mut first, mut second) = (first.into_iter().peekable(), second.into_iter().peekable());
    std::iter::from_fn(move || match (first.peek(), second.peek()) {
        (Some(a), Some(b)) if order(a, b).is_gt() => second.next(),
        (Some(_), _) => first.next(),
        (None, _) => second.next(),
    })
}

impl FromIterator<Atom> for AtomSet {
    fn from_iter<I: IntoIterator<Item = Atom>>(atoms: I) -> Self {
        let mut atoms = Vec::from_iter(atoms);
        atoms.sort_unstable();
        atoms.dedup();
        Self(atoms.into())
    }
}

/// Of pairs with equal keys the last counts.
impl FromIterator<(Atom, Atom)> for AtomMap {
    fn from_iter<I: IntoIterator<Item = (Atom, Atom)>>(pairs: I) -> Self {
        let mut pairs = Vec::from_iter(pairs);
        // Stable, so that the last of equal keys stays the last.
        pairs.sort_by(|a, b| a.0.cmp(&b.0));
        pairs.dedup_by(|later, kept| {
            let same = later.0 == kept.0;
            if same {
                std::mem::swap(&mut later.1, &mut kept.1);
            }
            same
        });
        Self(pairs.into())
    }
}

impl IntoIterator for AtomSet {
    type Item = Atom;
    type IntoIter = std::vec::IntoIter<Atom>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_vec().into_iter()
    }
}

impl IntoIterator for AtomMap {
    type Item = (Atom, Atom);
    type IntoIter = std::vec::IntoIter<(Atom, Atom)>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_vec().into_iter()
    }
}

impl<'a> IntoIterator for &'a AtomSet {
    type Item = &'a Atom;
    type IntoIter = std::slice::Iter<'a, Atom>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl<'a> IntoIterator for &'a AtomMap {
    type Item = &'a (Atom, Atom);
    type IntoIter = std::slice::Iter<'a, (Atom, Atom)>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}
