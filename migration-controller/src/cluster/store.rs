//! Objects of one kind, found by name and by secondary keys.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use handover::VmName;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

/// Namespace and name of an object; no namespace where the kind has none.
pub(crate) type ObjectName = (String, String);

/// What objects are looked up by, besides their names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Key {
    /// The VM that the object is about.
    Vm(VmName),
    /// UID of a VirtualMachineInstance.
    Vmi(String),
    /// UID of a migration.
    Migration(String),
}

/// An object that a [`Store`] can hold.
pub(crate) trait Stored: Send + Sync + 'static {
    /// Its metadata.
    fn meta(&self) -> &ObjectMeta;

    /// The keys to find it by.
    fn keys(&self) -> Vec<Key>;

    /// Those of them that its metadata alone tells.
    fn keys_of(_: &ObjectMeta) -> Vec<Key> {
        Vec::new()
    }
}

/// An object as it was last seen.
#[derive(Debug)]
pub(crate) enum Seen<T> {
    /// It could be read.
    Valid(Arc<T>),
    /// It could not. What it said before is not used: it might be the opposite of what it says now.
    Malformed {
        /// Its metadata, which could be read.
        meta: Box<ObjectMeta>,
        /// Why it could not.
        error: Arc<str>,
    },
}

/// The objects of one kind.
#[derive(Debug)]
pub(crate) struct Store<T> {
    entries: BTreeMap<ObjectName, Entry<T>>,
    by_key: HashMap<Key, BTreeSet<ObjectName>>,
}

#[derive(Debug)]
struct Entry<T> {
    seen: Seen<T>,
    keys: Vec<Key>,
}

// === impl Seen ===

impl<T> Clone for Seen<T> {
    fn clone(&self) -> Self {
        match self {
            Self::Valid(object) => Self::Valid(object.clone()),
            Self::Malformed { meta, error } => Self::Malformed {
                meta: meta.clone(),
                error: error.clone(),
            },
        }
    }
}

impl<T: Stored> Seen<T> {
    pub(crate) fn meta(&self) -> &ObjectMeta {
        match self {
            Self::Valid(object) => object.meta(),
            Self::Malformed { meta, .. } => meta,
        }
    }

    fn version(&self) -> Option<u64> {
        // Opaque in principle, an ever-growing number in every API server; where it is not one, the
        // last event wins, as it does for everybody else.
        self.meta().resource_version.as_deref()?.parse().ok()
    }
}

pub(crate) fn object_name(meta: &ObjectMeta) -> ObjectName {
    (
        meta.namespace.clone().unwrap_or_default(),
        meta.name.clone().unwrap_or_default(),
    )
}

// === impl Store ===

impl<T> Default for Store<T> {
    fn default() -> Self {
        Self {
            entries: BTreeMap::new(),
            by_key: HashMap::new(),
        }
    }
}

impl<T: Stored> Store<T> {
    /// Takes an object in. Returns the keys under which something changed: those it had and those it
    /// has; none when what is stored is newer.
    pub(crate) fn apply(&mut self, seen: Seen<T>) -> Vec<Key> {
        let name = object_name(seen.meta());
        let known = self.entries.get(&name);
        if known.is_some_and(|known| is_older(&seen, &known.seen)) {
            return Vec::new();
        }
        self.put(name, seen)
    }

    fn put(&mut self, name: ObjectName, seen: Seen<T>) -> Vec<Key> {
        let keys = match &seen {
            Seen::Valid(object) => object.keys(),
            // Where it belongs may be in the part that cannot be read: it stays where it was.
            Seen::Malformed { meta, .. } => {
                let known = self.entries.get(&name).map(|known| known.keys.clone());
                let told: BTreeSet<_> = T::keys_of(meta).into_iter().collect();
                told.into_iter()
                    .chain(known.into_iter().flatten())
                    .collect()
            }
        };
        let mut touched = self.take_out(&name);
        for key in &keys {
            self.by_key
                .entry(key.clone())
                .or_default()
                .insert(name.clone());
        }
        touched.extend(keys.iter().cloned());
        self.entries.insert(name, Entry { seen, keys });
        touched
    }

    /// Forgets an object, unless what is stored is newer than its deletion.
    pub(crate) fn delete(&mut self, seen: &Seen<T>) -> Vec<Key> {
        let name = object_name(seen.meta());
        match self.entries.get(&name) {
            Some(known) if is_older(seen, &known.seen) => Vec::new(),
            Some(_) => self.take_out(&name),
            None => Vec::new(),
        }
    }

    /// Takes in all objects there are, and forgets the others. A list is the truth whatever its
    /// objects' versions: they step back when an API server is restored from a backup.
    pub(crate) fn replace(&mut self, all: Vec<Seen<T>>) -> Vec<Key> {
        let listed: BTreeSet<_> = all.iter().map(|seen| object_name(seen.meta())).collect();
        let gone: Vec<_> = self
            .entries
            .keys()
            .filter(|name| !listed.contains(*name))
            .cloned()
            .collect();
        let mut touched: Vec<_> = gone.iter().flat_map(|name| self.take_out(name)).collect();
        for seen in all {
            touched.extend(self.put(object_name(seen.meta()), seen));
        }
        touched
    }

    /// The object of this name.
    pub(crate) fn get(&self, name: &ObjectName) -> Option<&Seen<T>> {
        self.entries.get(name).map(|entry| &entry.seen)
    }

    /// The objects under a key, in the order of their names.
    pub(crate) fn find<'a>(&'a self, key: &Key) -> impl Iterator<Item = &'a Seen<T>> + use<'a, T> {
        let names = self.by_key.get(key).into_iter().flatten();
        names.filter_map(|name| self.get(name))
    }

    /// All objects, in the order of their names.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Seen<T>> {
        self.entries.values().map(|entry| &entry.seen)
    }

    /// Every key there is.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &Key> {
        self.by_key.keys()
    }

    fn take_out(&mut self, name: &ObjectName) -> Vec<Key> {
        let Some(entry) = self.entries.remove(name) else {
            return Vec::new();
        };
        for key in &entry.keys {
            if let Some(names) = self.by_key.get_mut(key) {
                names.remove(name);
                if names.is_empty() {
                    self.by_key.remove(key);
                }
            }
        }
        entry.keys
    }
}

fn is_older<T: Stored>(seen: &Seen<T>, known: &Seen<T>) -> bool {
    match (seen.version(), known.version()) {
        (Some(seen), Some(known)) => seen < known,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Pet {
        meta: ObjectMeta,
        vm: &'static str,
    }

    impl Stored for Pet {
        fn meta(&self) -> &ObjectMeta {
            &self.meta
        }

        fn keys(&self) -> Vec<Key> {
            vec![key(self.vm)]
        }
    }

    fn key(vm: &str) -> Key {
        Key::Vm(VmName::new("ns", vm))
    }

    fn meta(name: &str, version: u64) -> ObjectMeta {
        ObjectMeta {
            namespace: Some("ns".into()),
            name: Some(name.into()),
            resource_version: Some(version.to_string()),
            ..ObjectMeta::default()
        }
    }

    fn pet(name: &str, version: u64, vm: &'static str) -> Seen<Pet> {
        let meta = meta(name, version);
        Seen::Valid(Arc::new(Pet { meta, vm }))
    }

    fn names(store: &Store<Pet>, vm: &str) -> Vec<String> {
        store
            .find(&key(vm))
            .map(|seen| object_name(seen.meta()).1)
            .collect()
    }

    #[test]
    fn an_object_that_moves_touches_both_keys() {
        let mut store = Store::default();
        store.apply(pet("a", 1, "x"));
        let touched = store.apply(pet("a", 2, "y"));
        assert_eq!(touched, [key("x"), key("y")]);
        assert!(names(&store, "x").is_empty());
        assert_eq!(names(&store, "y"), ["a"]);
    }

    #[test]
    fn what_is_late_changes_nothing() {
        let mut store = Store::default();
        store.apply(pet("a", 5, "x"));
        assert!(store.apply(pet("a", 4, "y")).is_empty());
        assert!(store.delete(&pet("a", 4, "y")).is_empty());
        assert_eq!(names(&store, "x"), ["a"]);
        assert_eq!(store.delete(&pet("a", 6, "x")), [key("x")]);
        assert!(names(&store, "x").is_empty());
    }

    #[test]
    fn a_list_forgets_what_it_does_not_name() {
        let mut store = Store::default();
        store.apply(pet("a", 1, "x"));
        store.apply(pet("b", 1, "x"));
        let touched = store.replace(vec![pet("b", 1, "x"), pet("c", 2, "x")]);
        assert!(touched.contains(&key("x")));
        assert_eq!(names(&store, "x"), ["b", "c"]);
    }

    #[test]
    fn a_list_outweighs_what_is_known_even_where_versions_step_back() {
        let mut store = Store::default();
        store.apply(pet("a", 5, "x"));
        store.replace(vec![pet("a", 2, "y")]);
        assert_eq!(names(&store, "y"), ["a"]);
        assert!(!store.apply(pet("a", 3, "y")).is_empty());
    }

    #[test]
    fn a_malformed_object_stays_where_it_was() {
        let mut store = Store::default();
        store.apply(pet("a", 1, "x"));
        let touched = store.apply(Seen::Malformed {
            meta: Box::new(meta("a", 2)),
            error: "nonsense".into(),
        });
        assert!(touched.contains(&key("x")));
        assert!(matches!(
            store.find(&key("x")).next(),
            Some(Seen::Malformed { .. })
        ));
    }
}
