//! Pages held against their size before the decoder sees them.

use parquet::basic::{Encoding, Type as PhysicalType};
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::errors::{ParquetError, Result};
use parquet::schema::types::ColumnDescPtr;

/// Far above what any writer puts into a page, far below what would exhaust memory.
const PAGE_LIMIT_VALUES: u32 = 1 << 26;

/// A page reader that refuses pages whose headers promise what their bytes cannot hold.
pub(super) struct CheckedPages {
    pages: Box<dyn PageReader>,
    /// Fewest bytes that one value of a dictionary takes.
    value_bytes: usize,
    holds_text: bool,
}

impl CheckedPages {
    pub(super) fn new(pages: Box<dyn PageReader>, leaf: &ColumnDescPtr) -> Self {
        let physical_type = leaf.physical_type();
        Self {
            pages,
            value_bytes: if physical_type == PhysicalType::INT64 { 8 } else { 4 },
            holds_text: physical_type == PhysicalType::BYTE_ARRAY,
        }
    }

    fn check(&self, page: &Page) -> Result<()> {
        match page {
            Page::DictionaryPage { buf, num_values, .. } => {
                if *num_values as usize > buf.len() / self.value_bytes {
                    return Err(ParquetError::General(format!(
                        "a dictionary of {} bytes cannot hold {num_values} values",
                        buf.len()
                    )));
                }
            }
            Page::DataPage { num_values, encoding, .. } | Page::DataPageV2 { num_values, encoding, .. } => {
                if *num_values > PAGE_LIMIT_VALUES {
                    return Err(ParquetError::General(format!(
                        "a page claims {num_values} values, more than {PAGE_LIMIT_VALUES}"
                    )));
                }
                self.check_encoding(*encoding)?;
            }
        }
        Ok(())
    }

    /// Text is read in the plain and the dictionary form, which all common writers use. The
    /// delta forms hold counts of their own, which the decoder would trust.
    fn check_encoding(&self, encoding: Encoding) -> Result<()> {
        let plain_or_dictionary =
            [Encoding::PLAIN, Encoding::PLAIN_DICTIONARY, Encoding::RLE_DICTIONARY].contains(&encoding);
        if plain_or_dictionary || (!self.holds_text && encoding == Encoding::DELTA_BINARY_PACKED) {
            return Ok(());
        }
        Err(ParquetError::General(format!(
            "pages in the encoding {encoding} are not read: write the file with plain or dictionary encoding"
        )))
    }
}

impl Iterator for CheckedPages {
    type Item = Result<Page>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

impl PageReader for CheckedPages {
    fn get_next_page(&mut self) -> Result<Option<Page>> {
        let page = self.pages.get_next_page()?;
        if let Some(page) = &page {
            self.check(page)?;
        }
        Ok(page)
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>> {
        self.pages.peek_next_page()
    }

    fn skip_next_page(&mut self) -> Result<()> {
        self.pages.skip_next_page()
    }
}
