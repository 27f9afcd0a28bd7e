//! What a domain keeps of its processor when it is saved: the features that its kernel has made its decisions by.

use serde::{Deserialize, Serialize};

use crate::features::{FEATURES, Word};
use crate::host::Vendor;
use crate::table::{CpuidError, CpuidTable, Dynamic};

/// The features of a domain's table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedFeatures {
    vendor: Vendor,
    words: Vec<SavedWord>,
}

/// A result register of CPUID: as [`Word`], with its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedWord {
    leaf: u32,
    subleaf: u32,
    reg: usize,
    value: u32,
}

impl SavedFeatures {
    /// Gives the words the values they were saved with; an error where this host cannot offer all of them.
    pub(crate) fn apply(
        &self,
        words: &mut [(&Word, u32)],
        vendor: Vendor,
    ) -> Result<(), CpuidError> {
        if self.vendor != vendor {
            return Err(CpuidError::SavedVendor);
        }
        for saved in &self.words {
            let known = |w: &Word| {
                (w.leaf, w.subleaf, w.reg as usize) == (saved.leaf, saved.subleaf, saved.reg)
            };
            let lacks = |name| Err(CpuidError::SavedFeature { name });
            let Some((word, value)) = words.iter_mut().find(|(w, _)| known(w)) else {
                if saved.value == 0 {
                    continue;
                }
                return lacks("a feature that is not known here");
            };
            let missing = saved.value & !*value;
            if missing != 0 {
                let feature = |f: &&crate::Feature| missing >> f.bit & 1 != 0;
                let feature = word.features.iter().find(feature);
                return lacks(feature.map_or("a feature that is not known here", |f| f.name));
            }
            *value = saved.value;
        }
        Ok(())
    }
}

impl CpuidTable {
    /// What is to be saved of the table.
    pub fn features(&self) -> SavedFeatures {
        let value = |word: &Word| {
            let known = word.features.iter().fold(0, |bits, f| bits | 1 << f.bit);
            let regs = self.lookup(word.leaf, word.subleaf, &Dynamic::default());
            regs[word.reg as usize] & known
        };
        let words = FEATURES.iter().map(|word| SavedWord {
            leaf: word.leaf,
            subleaf: word.subleaf,
            reg: word.reg as usize,
            value: value(word),
        });
        SavedFeatures {
            vendor: self.vendor(),
            words: words.collect(),
        }
    }
}
