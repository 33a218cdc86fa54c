//! Analyses of code, kept by what was analysed.
//!
//! Many workers run the same library, and patches of one come one after the
//! other: each file is analysed once. The key is a digest of the whole file. A
//! build-id alone would not do: tools that rewrite a library (BOLT, patchelf,
//! objcopy) leave it as it was, and a file from a container says what it likes.
//!
//! What is kept is bounded: the least used go first, and what nobody has used
//! for a while goes as well once [`Analyses::tidy`] comes by.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use moka::sync::Cache;

use crate::code::{self, CodeError, CodeMap, Executable};

/// Files of which analyses are kept, in bytes together. An analysis takes some
/// three times as much memory as its file.
const MOST_BYTES: u64 = 64 << 20;
/// How long an analysis is kept that nobody uses.
const IDLE: Duration = Duration::from_secs(600);

type Digest = [u8; 32];
type Kept<T> = Cache<Digest, (Result<Arc<T>, CodeError>, u32)>;

/// Analyses of libraries and executables, for all threads.
#[derive(Clone)]
pub struct Analyses {
    libraries: Kept<CodeMap>,
    executables: Kept<Executable>,
}

impl fmt::Debug for Analyses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Analyses").finish_non_exhaustive()
    }
}

impl Default for Analyses {
    fn default() -> Analyses {
        Analyses::bounded(MOST_BYTES, IDLE)
    }
}

impl Analyses {
    /// Keeps analyses of files of at most `bytes` together, for libraries and
    /// for executables each, and of those only what was used within `idle`.
    #[must_use]
    pub fn bounded(bytes: u64, idle: Duration) -> Analyses {
        Analyses {
            libraries: kept(bytes, idle),
            executables: kept(bytes, idle),
        }
    }

    /// The analysis of a caller's library ([`code::analyse`]).
    ///
    /// # Errors
    /// As for [`code::analyse`]; that is kept, too.
    pub fn library(&self, file: &[u8]) -> Result<Arc<CodeMap>, CodeError> {
        once(&self.libraries, file, code::analyse)
    }

    /// The analysis of a worker's executable ([`Executable::parse`]).
    ///
    /// # Errors
    /// As for [`Executable::parse`]; that is kept, too.
    pub fn executable(&self, file: &[u8]) -> Result<Arc<Executable>, CodeError> {
        once(&self.executables, file, Executable::parse)
    }

    /// Lets go of what nobody has used for a while.
    pub fn tidy(&self) {
        self.libraries.run_pending_tasks();
        self.executables.run_pending_tasks();
    }

    /// How many analyses are kept.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.tidy();
        self.libraries.entry_count() + self.executables.entry_count()
    }
}

fn kept<T: Send + Sync + 'static>(bytes: u64, idle: Duration) -> Kept<T> {
    Cache::builder()
        .max_capacity(bytes)
        .weigher(|_, (_, len): &(_, u32)| *len)
        .time_to_idle(idle)
        .build()
}

/// Those who ask for the same file at once wait for the first.
fn once<T: Send + Sync + 'static>(
    kept: &Kept<T>,
    file: &[u8],
    analyse: impl FnOnce(&[u8]) -> Result<T, CodeError>,
) -> Result<Arc<T>, CodeError> {
    let digest = blake3::hash(file).into();
    let len = u32::try_from(file.len()).unwrap_or(u32::MAX);
    kept.get_with(digest, || (analyse(file).map(Arc::new), len))
        .0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::code::tests::library;

    /// A library whose function returns a number.
    fn file(number: u8) -> Vec<u8> {
        library(&[0xb8, number, 0, 0, 0, 0xc3], &[("f", 0, 6)], &[])
    }

    #[test]
    fn a_file_is_analysed_once_and_another_of_the_same_headers_is_another() {
        let analyses = Analyses::default();
        let first = analyses.library(&file(1)).unwrap();
        assert!(Arc::ptr_eq(&first, &analyses.library(&file(1)).unwrap()));
        assert!(!Arc::ptr_eq(&first, &analyses.library(&file(2)).unwrap()));
        assert_eq!(analyses.count(), 2);
        // The same file as an executable is read as one.
        analyses.executable(&file(1)).unwrap();
        assert_eq!(analyses.count(), 3);
    }

    #[test]
    fn those_who_come_at_once_share_one_analysis() {
        let analyses = Analyses::default();
        let bytes = file(1);
        let maps: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| analyses.library(&bytes).unwrap()))
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert!(maps.iter().all(|map| Arc::ptr_eq(map, &maps[0])));
    }

    #[test]
    fn what_cannot_be_analysed_is_said_again() {
        let analyses = Analyses::default();
        for _ in 0..2 {
            let error = analyses.library(b"no library").err();
            assert_eq!(error, Some(CodeError::NotElf));
        }
        assert_eq!(analyses.count(), 1);
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let one = file(0).len() as u64;
        let analyses = Analyses::bounded(3 * one, IDLE);
        for number in 0..20 {
            analyses.library(&file(number)).unwrap();
        }
        assert!((1..=3).contains(&analyses.count()), "{}", analyses.count());
        // One that is too large for it is analysed all the same.
        let none = Analyses::bounded(one - 1, IDLE);
        none.library(&file(1)).unwrap();
        assert_eq!(none.count(), 0);
    }

    #[test]
    fn what_nobody_uses_goes() {
        let analyses = Analyses::bounded(1 << 20, Duration::from_millis(1));
        analyses.library(&file(1)).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(analyses.count(), 0);
    }
}
