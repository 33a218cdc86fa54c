//! A bounded table of what is counted by name.
//!
//! Entries that living workers count for stay. When there is no room for
//! another one, the one goes that no worker has counted for the longest time;
//! where there is none of these, the new one gets no place.

use std::collections::HashMap;
use std::hash::Hash;

/// An entry's place.
pub(super) type Id = u32;

#[derive(Debug)]
struct Entry<K, V> {
    key: K,
    value: V,
    /// Series of living workers that count for it.
    uses: usize,
    /// Where `uses` is 0: the number of the sample in which that came about.
    since: u64,
}

#[derive(Debug)]
pub(super) struct Registry<K, V> {
    limit: usize,
    entries: Vec<Entry<K, V>>,
    ids: HashMap<K, Id>,
    idle: usize,
    forgotten: u64,
}

impl<K: Clone + Eq + Hash, V: Default> Registry<K, V> {
    /// One that has room for so many.
    pub(super) fn new(limit: usize) -> Registry<K, V> {
        Registry {
            limit,
            entries: Vec::new(),
            ids: HashMap::new(),
            idle: 0,
            forgotten: 0,
        }
    }

    /// The place of an entry that a series of a worker counts for from now on;
    /// made where there is none. `None` where there is no room.
    pub(super) fn acquire(&mut self, key: &K) -> Option<Id> {
        if let Some(&id) = self.ids.get(key) {
            let entry = &mut self.entries[id as usize];
            if entry.uses == 0 {
                self.idle -= 1;
            }
            entry.uses += 1;
            return Some(id);
        }
        let new = Entry {
            key: key.clone(),
            value: V::default(),
            uses: 1,
            since: 0,
        };
        let id = if self.entries.len() < self.limit {
            self.entries.push(new);
            (self.entries.len() - 1) as Id
        } else {
            let id = self.longest_idle()?;
            let old = std::mem::replace(&mut self.entries[id as usize], new);
            self.ids.remove(&old.key);
            self.idle -= 1;
            self.forgotten += 1;
            id
        };
        self.ids.insert(key.clone(), id);
        Some(id)
    }

    fn longest_idle(&self) -> Option<Id> {
        if self.idle == 0 {
            return None;
        }
        let entries = (0..).zip(&self.entries);
        let idle = entries.filter(|(_, entry)| entry.uses == 0);
        idle.min_by_key(|(_, entry)| entry.since).map(|(id, _)| id)
    }

    /// A series counts for this entry no more.
    pub(super) fn release(&mut self, id: Id, sample: u64) {
        let entry = &mut self.entries[id as usize];
        entry.uses -= 1;
        entry.since = sample;
        if entry.uses == 0 {
            self.idle += 1;
        }
    }

    pub(super) fn value(&mut self, id: Id) -> &mut V {
        &mut self.entries[id as usize].value
    }

    /// All of them, in no order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Id, &K, &V)> {
        let entries = (0..).zip(&self.entries);
        entries.map(|(id, entry)| (id, &entry.key, &entry.value))
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (&K, &mut V)> {
        self.entries
            .iter_mut()
            .map(|entry| (&entry.key, &mut entry.value))
    }

    /// Entries that had to go.
    pub(super) fn forgotten(&self) -> u64 {
        self.forgotten
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_entries_that_no_worker_counts_for_go_the_longest_idle_first() {
        let mut registry: Registry<&str, u32> = Registry::new(2);
        let a = registry.acquire(&"a").unwrap();
        let b = registry.acquire(&"b").unwrap();
        assert_eq!(registry.acquire(&"a"), Some(a));
        *registry.value(a) = 7;
        assert_eq!(registry.acquire(&"c"), None);
        registry.release(a, 1);
        assert_eq!(registry.acquire(&"c"), None, "a is still in use");
        registry.release(b, 2);
        registry.release(a, 3);
        // b is idle for longer.
        assert_eq!(registry.acquire(&"c"), Some(b));
        assert_eq!(registry.acquire(&"a"), Some(a));
        assert_eq!(*registry.value(a), 7, "it came back as it was");
        assert_eq!(registry.acquire(&"b"), None);
        assert_eq!(registry.forgotten(), 1);
    }
}
