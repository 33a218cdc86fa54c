//! The journal's file, as redb uses it, with a fault point around each thing
//! that is done to it.

use std::fs::File;
use std::io;
use std::ops::Bound;

use redb::backends::FileBackend;
use redb::{BackendError, DatabaseError, StorageBackend};

use crate::faults::{self, hit};

#[derive(Debug)]
pub(super) struct Backend(FileBackend);

impl Backend {
    pub(super) fn new(file: File) -> Result<Self, DatabaseError> {
        FileBackend::new(file).map(Self)
    }
}

impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        hit(faults::FILE_LENGTH_BEFORE);
        let result = self.0.set_len(len);
        hit(faults::FILE_LENGTH_AFTER);
        result
    }

    fn sync_data(&self) -> io::Result<()> {
        hit(faults::FILE_SYNC_BEFORE);
        let result = self.0.sync_data();
        hit(faults::FILE_SYNC_AFTER);
        result
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        hit(faults::FILE_WRITE_BEFORE);
        let result = self.0.write(offset, data);
        hit(faults::FILE_WRITE_AFTER);
        result
    }

    fn close(&self) -> io::Result<()> {
        self.0.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.0.try_lock_range(start, end)
    }

    fn try_lock_shared_range(
        &self,
        start: Bound<u64>,
        end: Bound<u64>,
    ) -> Result<bool, BackendError> {
        self.0.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.0.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.0.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.0.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.0.query_lock_range(start, end)
    }
}
